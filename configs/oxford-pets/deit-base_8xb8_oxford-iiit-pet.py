"""ViT-B/16 on Oxford-IIIT Pet, from its ImageNet-1k weights: the start of *_baseline-ft.py and *_denoiserep.py.

Ours, after mmpretrain's recipe for CUB-200-2011: 100 epochs of AdamW at 5e-5, batches of 64.
Untested at full size: no result is claimed.
"""

_base_ = [
    '../_base_/models/deit-base_in1k-pre.py',
    '../_base_/datasets/oxford-iiit-pet_bs8_224.py',
    '../_base_/schedules/cub_bs64_adamw.py',
    '../_base_/few-images_runtime.py',
]

model = dict(head=dict(num_classes=37))
