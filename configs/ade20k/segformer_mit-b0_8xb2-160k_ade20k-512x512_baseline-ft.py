"""Control of *_denoiserep.py: the released SegFormer MiT-B0, trained on without denoising.

Ours. The released checkpoint has mIoU 37.41 (mmseg's metafile); what 40,000 more iterations alone do to it is what
this config measures. Evaluation reports mIoU, aAcc and boundary IoU, as the paper does.
"""

_base_ = ['mmseg::segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512.py', '../_base_/ade20k_ft.py']

load_from = (
    'https://download.openmmlab.com/mmsegmentation/v0.5/segformer/segformer_mit-b0_512x512_160k_ade20k/'
    'segformer_mit-b0_512x512_160k_ade20k_20210726_101530-8ffa8fda.pth'
)
model = dict(backbone=dict(init_cfg=None))  # load_from loads these weights
train_cfg = dict(max_iters=_base_.max_iters, val_interval=4000)
default_hooks = dict(checkpoint=dict(interval=4000))
optim_wrapper = dict(optimizer=dict(lr=6e-6))  # a tenth of the learning rate of the checkpoint
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type='PolyLR', eta_min=0.0, power=1.0, begin=1500, end=_base_.max_iters, by_epoch=False),
]
val_evaluator = test_evaluator = [dict(type='IoUMetric', iou_metrics=['mIoU']), dict(type='BoundaryIoUMetric')]
