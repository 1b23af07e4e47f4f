"""A small VMamba on Fashion-MNIST, trained from scratch on one CPU core.

Write the data first: python -m studies.prepare_fashion_mnist
"""

_base_ = ['../_base_/datasets/fashion-mnist.py', '../_base_/schedules/demo.py', '../_base_/demo_runtime.py']

custom_imports = dict(imports=['mmdenoiserep'], allow_failed_imports=False)
model = dict(
    type='ImageClassifier',
    backbone=dict(
        type='VMamba',
        arch=dict(dims=(32, 64), depths=(2, 2), ssm_ratio=1.0),
        in_channels=1,
        out_indices=(1,),
    ),
    neck=dict(type='GlobalAveragePooling'),
    head=dict(type='LinearClsHead', num_classes=10, in_channels=64, loss=dict(type='CrossEntropyLoss'), topk=(1,)),
)
