"""ViT-B/16 on VehicleID, 256 x 256 pixels, from ImageNet weights: the start of *_baseline-ft.py and *_denoiserep.py.

After TransReID's baseline: SGD at 0.045 for batches of 224 on 4 GPUs, linear warm-up; its authors give rank-1 83.5 and
rank-5 96.7 for the 800 test vehicles. The length of the schedule is ours.
Untested at full size: no result is claimed.
"""

_base_ = [
    '../_base_/models/vit-base-p16_reid.py',
    '../_base_/datasets/vehicleid_256x256.py',
    '../_base_/schedules/reid_sgd_120e.py',
    '../_base_/reid_runtime.py',
]

model = dict(backbone=dict(img_size=256), head=dict(num_classes=13164))
train_dataloader = dict(batch_size=56, sampler=dict(num_ids=14))
optim_wrapper = dict(optimizer=dict(lr=0.045))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=True, begin=0, end=5),
    dict(type='CosineAnnealingLR', eta_min_ratio=0.002, by_epoch=True, begin=5, end=120, T_max=115),
]
auto_scale_lr = dict(base_batch_size=224)
