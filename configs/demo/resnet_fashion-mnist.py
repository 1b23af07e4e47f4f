"""A small ResNet on Fashion-MNIST, trained from scratch on one CPU core.

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
        type='ResNet_CIFAR',
        depth=18,
        num_stages=3,
        strides=(2, 2, 2),
        dilations=(1, 1, 1),
        out_indices=(2,),
        stem_channels=16,
        base_channels=16,
        in_channels=1,
    ),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(type='LinearClsHead', num_classes=10, in_channels=64, loss=dict(type='CrossEntropyLoss'), topk=(1,)),
)

default_hooks = dict(
    logger=dict(interval=20),
    checkpoint=dict(by_epoch=False, interval=10**9, save_last=True),
)
log_processor = dict(by_epoch=False, window_size=20)
randomness = dict(seed=0)
