"""A small ViT on Fashion-MNIST, trained from scratch on one CPU core.

Write the data first: python -m studies.prepare_fashion_mnist
"""

_base_ = ['../_base_/datasets/fashion-mnist.py', '../_base_/schedules/demo.py', '../_base_/demo_runtime.py']

model = dict(
    type='ImageClassifier',
    backbone=dict(
        type='VisionTransformer',
        arch=dict(embed_dims=64, num_layers=4, num_heads=4, feedforward_channels=128),
        img_size=28,
        patch_size=4,
        in_channels=1,
        out_type='avg_featmap',
        with_cls_token=False,
    ),
    head=dict(type='LinearClsHead', num_classes=10, in_channels=64, loss=dict(type='CrossEntropyLoss'), topk=(1,)),
)
