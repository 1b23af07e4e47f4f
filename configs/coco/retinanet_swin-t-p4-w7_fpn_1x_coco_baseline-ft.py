"""Control of *_denoiserep.py: RetinaNet Swin-T, trained on without denoising.

Ours. mmdet releases no checkpoint of this detector; load_from is what training retinanet_swin-t-p4-w7_fpn_1x_coco.py
leaves. What more training alone does to it is what this config measures.
"""

_base_ = './retinanet_swin-t-p4-w7_fpn_1x_coco.py'

load_from = 'work_dirs/retinanet_swin-t-p4-w7_fpn_1x_coco/epoch_12.pth'
model = dict(backbone=dict(init_cfg=None))  # load_from loads these weights
optim_wrapper = dict(optimizer=dict(lr=0.001))  # a tenth of the learning rate of the checkpoint
