"""A small ResNet on Fashion-MNIST, trained from scratch on one CPU core.

Write the data first: python -m studies.prepare_fashion_mnist
"""

_base_ = ['../_base_/datasets/fashion-mnist.py', '../_base_/schedules/demo.py', '../_base_/demo_runtime.py']

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
