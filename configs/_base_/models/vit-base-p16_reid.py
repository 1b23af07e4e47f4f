"""ViT-B/16 from ImageNet weights, for images of 256 x 128 pixels."""

checkpoint = (
    'https://download.openmmlab.com/mmclassification/v0/vit/finetune/'
    'vit-base-p16_in21k-pre-3rdparty_ft-64xb64_in1k-384_20210928-98e8652b.pth'
)
model = dict(
    type='ImageClassifier',
    backbone=dict(
        type='ReIDVisionTransformer',
        arch='base',
        img_size=(256, 128),
        patch_size=16,
        drop_path_rate=0.1,
        interpolate_mode='bilinear',
        init_cfg=dict(type='Pretrained', checkpoint=checkpoint, prefix='backbone'),
    ),
    head=dict(type='BNNeckReIDHead', num_classes=751, in_channels=768),
)
