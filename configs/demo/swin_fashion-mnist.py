"""A small Swin Transformer on Fashion-MNIST, trained from scratch on one CPU core.

Write the data first: python tools/prepare_fashion_mnist.py
"""

_base_ = [
    'mmpretrain::_base_/default_runtime.py',
    '../_base_/datasets/fashion-mnist.py',
    '../_base_/schedules/fashion-mnist.py',
]

model = dict(
    type='ImageClassifier',
    backbone=dict(
        type='SwinTransformer',
        arch=dict(embed_dims=48, depths=[2, 4], num_heads=[2, 4]),
        img_size=28,
        patch_size=4,
        window_size=4,
        in_channels=1,
        drop_path_rate=0.0,
        out_indices=(1,),
    ),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(type='LinearClsHead', num_classes=10, in_channels=96, loss=dict(type='CrossEntropyLoss'), topk=(1,)),
)

default_hooks = dict(
    logger=dict(interval=20),
    checkpoint=dict(by_epoch=False, interval=10**9, save_last=True),
)
log_processor = dict(by_epoch=False, window_size=20)
randomness = dict(seed=0)
