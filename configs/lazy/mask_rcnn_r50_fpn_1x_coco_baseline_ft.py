"""Control of *_denoiserep.py: the released Mask R-CNN ResNet-50 (1x), trained on without denoising; a lazy config.

The same settings as coco/mask-rcnn_r50_fpn_1x_coco_baseline-ft.py.
"""

from mmengine.config import read_base

with read_base():
    from ._base_.mask_rcnn_r50_fpn_1x_coco import *

load_from = (
    'https://download.openmmlab.com/mmdetection/v2.0/mask_rcnn/mask_rcnn_r50_fpn_1x_coco/'
    'mask_rcnn_r50_fpn_1x_coco_20200205-d4b0c5d6.pth'
)
model.update(backbone=dict(init_cfg=None))  # load_from loads these weights
optim_wrapper.update(optimizer=dict(lr=0.002))  # a tenth of the learning rate of the checkpoint
