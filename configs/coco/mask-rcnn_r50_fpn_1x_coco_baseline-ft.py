"""Control of *_denoiserep.py: the released Mask R-CNN ResNet-50 (1x), trained on without denoising.

Ours. The released checkpoint has box AP 38.2 and mask AP 34.7 (mmdet's metafile); what more training alone does to it
is what this config measures.
"""

_base_ = 'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py'

load_from = (
    'https://download.openmmlab.com/mmdetection/v2.0/mask_rcnn/mask_rcnn_r50_fpn_1x_coco/'
    'mask_rcnn_r50_fpn_1x_coco_20200205-d4b0c5d6.pth'
)
model = dict(backbone=dict(init_cfg=None))  # load_from loads these weights
optim_wrapper = dict(optimizer=dict(lr=0.002))  # a tenth of the learning rate of the checkpoint
