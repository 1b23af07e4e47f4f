"""ResNet-50 on Market-1501, 256 x 128 pixels: the start of *_baseline-ft.py and *_denoiserep.py.

The recipe is the bag of tricks (Luo et al., CVPRW 2019, arXiv 1903.07071) without its center loss: stride 1 in the last
stage, label smoothing, triplet loss with margin 0.3, warm-up, random erasing, the feature behind the neck at test time.
Untested at full size: no result is claimed.
"""

_base_ = [
    '../_base_/models/resnet50_in1k-pre.py',
    '../_base_/datasets/market1501_256x128.py',
    '../_base_/reid_runtime.py',
]

data_preprocessor = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375])
model = dict(
    backbone=dict(strides=(1, 2, 2, 1)),
    head=dict(
        _delete_=True,
        type='BNNeckReIDHead',
        num_classes=751,
        in_channels=2048,
        margin=0.3,
        test_feature='after',
        loss=dict(type='LabelSmoothLoss', label_smooth_val=0.1, mode='original'),
    ),
)

train_cfg = dict(by_epoch=True, max_epochs=120, val_interval=20)
val_cfg = dict()
test_cfg = dict()
optim_wrapper = dict(optimizer=dict(type='Adam', lr=3.5e-4, weight_decay=5e-4))
param_scheduler = [
    dict(type='LinearLR', start_factor=0.1, by_epoch=True, begin=0, end=10),
    dict(type='MultiStepLR', by_epoch=True, milestones=[40, 70], gamma=0.1),
]
auto_scale_lr = dict(base_batch_size=64)
