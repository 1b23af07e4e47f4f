"""RetinaNet Swin-T on COCO as mmdet has it: the baseline that the two configs beside it continue.

mmdet releases no checkpoint and no figure for it, so this one has to be trained first.
"""

_base_ = 'mmdet::swin/retinanet_swin-t-p4-w7_fpn_1x_coco.py'
