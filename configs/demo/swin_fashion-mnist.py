"""A small Swin Transformer on Fashion-MNIST, trained from scratch on one CPU core.

Write the data first: python -m studies.prepare_fashion_mnist
"""

_base_ = ['../_base_/datasets/fashion-mnist.py', '../_base_/schedules/demo.py', '../_base_/demo_runtime.py']

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
