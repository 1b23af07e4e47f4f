"""Control of *_denoiserep.py: Mask R-CNN VMamba-T, trained on without denoising.

Ours: the schedule of the baseline again, at a tenth of its rate. What more training alone does to the detector is what
this config measures. Run mask-rcnn_vmamba-tiny_fpn_1x_coco.py first.
"""

_base_ = './mask-rcnn_vmamba-tiny_fpn_1x_coco.py'

load_from = 'work_dirs/mask-rcnn_vmamba-tiny_fpn_1x_coco/epoch_12.pth'
model = dict(backbone=dict(init_cfg=None))  # load_from loads these weights
optim_wrapper = dict(optimizer=dict(lr=1e-5))
