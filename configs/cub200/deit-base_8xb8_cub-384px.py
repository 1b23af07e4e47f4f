"""ViT-B/16 on CUB-200-2011, from its ImageNet-1k weights: the start of *_baseline-ft.py and *_denoiserep.py.

Ours, after mmpretrain's recipe for CUB-200-2011: 100 epochs of AdamW at 5e-5, batches of 64.
Untested at full size: no result is claimed.
"""

_base_ = [
    '../_base_/models/deit-base_in1k-pre.py',
    'mmpretrain::_base_/datasets/cub_bs8_384.py',
    '../_base_/schedules/cub_bs64_adamw.py',
    '../_base_/few-images_runtime.py',
]

checkpoint = (
    'https://download.openmmlab.com/mmclassification/v0/deit/'
    'deit-base_3rdparty_ft-16xb32_in1k-384px_20211124-822d02f2.pth'
)
model = dict(backbone=dict(img_size=384, init_cfg=dict(checkpoint=checkpoint)), head=dict(num_classes=200))
