"""ViT-S/16 of TransReID-SSL for images of 256 x 128 pixels, from its weights pretrained on LUPerson.

The released vit_small_cfs_lup.pth becomes the file below by
``python tools/model_converters/convert_checkpoint.py transreid vit_small_cfs_lup.pth
pretrained/vit-small-p16_cfs-luperson.pth``.
"""

model = dict(
    type='ImageClassifier',
    backbone=dict(
        type='ReIDVisionTransformer',
        arch='deit-small',
        img_size=(256, 128),
        patch_size=16,
        drop_path_rate=0.1,
        interpolate_mode='bilinear',
        init_cfg=dict(type='Pretrained', checkpoint='pretrained/vit-small-p16_cfs-luperson.pth', prefix='backbone'),
    ),
    head=dict(type='BNNeckReIDHead', num_classes=751, in_channels=384),
)
