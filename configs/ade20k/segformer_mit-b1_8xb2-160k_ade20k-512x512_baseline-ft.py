"""Control of *_denoiserep.py: the released SegFormer MiT-B1, trained on without denoising.

Ours. The released checkpoint has mIoU 40.97 (mmseg's metafile); what 40,000 more iterations alone do to it is what
this config measures. Evaluation reports mIoU, aAcc and boundary IoU, as the paper does.
"""

_base_ = 'mmseg::segformer/segformer_mit-b1_8xb2-160k_ade20k-512x512.py'

custom_imports = dict(imports=['mmdenoiserep.evaluation.boundary_iou'], allow_failed_imports=False)
load_from = (
    'https://download.openmmlab.com/mmsegmentation/v0.5/segformer/segformer_mit-b1_512x512_160k_ade20k/'
    'segformer_mit-b1_512x512_160k_ade20k_20210726_112106-d70e859d.pth'
)
model = dict(backbone=dict(init_cfg=None))  # load_from brings these weights
max_iters = 40000
train_cfg = dict(max_iters=max_iters, val_interval=4000)
default_hooks = dict(checkpoint=dict(interval=4000))
optim_wrapper = dict(optimizer=dict(lr=6e-6))  # a tenth of the rate that the checkpoint was trained with
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-6, by_epoch=False, begin=0, end=1500),
    dict(type='PolyLR', eta_min=0.0, power=1.0, begin=1500, end=max_iters, by_epoch=False),
]
val_evaluator = [dict(type='IoUMetric', iou_metrics=['mIoU']), dict(type='BoundaryIoUMetric')]
test_evaluator = val_evaluator
