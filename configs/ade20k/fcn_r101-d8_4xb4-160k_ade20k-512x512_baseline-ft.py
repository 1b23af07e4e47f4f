"""Control of *_denoiserep.py: the released FCN ResNet-101, trained on without denoising, as ResNet-50 is.

The released checkpoint has mIoU 39.91 (mmseg's metafile).
"""

_base_ = './fcn_r50-d8_4xb4-160k_ade20k-512x512_baseline-ft.py'

load_from = (
    'https://download.openmmlab.com/mmsegmentation/v0.5/fcn/fcn_r101-d8_512x512_160k_ade20k/'
    'fcn_r101-d8_512x512_160k_ade20k_20200615_105816-fd192bd5.pth'
)
model = dict(backbone=dict(depth=101))
