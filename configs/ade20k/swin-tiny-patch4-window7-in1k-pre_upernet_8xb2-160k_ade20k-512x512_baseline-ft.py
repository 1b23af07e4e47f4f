"""Control of *_denoiserep.py: the released UPerNet Swin-T, trained on without denoising.

Ours. The released checkpoint has mIoU 44.41 (mmseg's metafile); what 40,000 more iterations alone do to it is what
this config measures. Evaluation reports mIoU, aAcc and boundary IoU, as the paper does.
"""

_base_ = ['mmseg::swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py', '../_base_/ade20k_ft.py']

load_from = (
    'https://download.openmmlab.com/mmsegmentation/v0.5/swin/upernet_swin_tiny_patch4_window7_512x512_160k_ade20k_pretrain_224x224_1K/'
    'upernet_swin_tiny_patch4_window7_512x512_160k_ade20k_pretrain_224x224_1K_20210531_112542-e380ad3e.pth'
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
