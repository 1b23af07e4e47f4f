"""Control of *_denoiserep.py: the released FCN ResNet-50, trained on without denoising.

Ours. The released checkpoint has mIoU 36.10 (mmseg's metafile); what 40,000 more iterations alone do to it is what
this config measures. Evaluation reports mIoU, aAcc and boundary IoU, as the paper does.
"""

_base_ = ['mmseg::fcn/fcn_r50-d8_4xb4-160k_ade20k-512x512.py', '../_base_/ade20k_ft.py']

load_from = (
    'https://download.openmmlab.com/mmsegmentation/v0.5/fcn/fcn_r50-d8_512x512_160k_ade20k/'
    'fcn_r50-d8_512x512_160k_ade20k_20200615_100713-4edbc3b4.pth'
)
model = dict(pretrained=None)  # load_from loads these weights
train_cfg = dict(max_iters=_base_.max_iters, val_interval=4000)
default_hooks = dict(checkpoint=dict(interval=4000))
optim_wrapper = dict(optimizer=dict(lr=0.001))  # a tenth of the learning rate of the checkpoint
param_scheduler = [dict(type='PolyLR', eta_min=1e-5, power=0.9, begin=0, end=_base_.max_iters, by_epoch=False)]
val_evaluator = test_evaluator = [dict(type='IoUMetric', iou_metrics=['mIoU']), dict(type='BoundaryIoUMetric')]
