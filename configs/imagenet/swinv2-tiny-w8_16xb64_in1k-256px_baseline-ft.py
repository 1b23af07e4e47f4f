"""Control of *_denoiserep.py: the released SwinV2-T, trained on without denoising.

The recipe is that of the official SwinV2-T run: 120 epochs of AdamW at 5e-5 and at the end 5e-6, both per 512 images,
20 epochs of warm-up, clipping at 5.
The released checkpoint has top-1 81.76 (mmpretrain's metafile); what more training alone does to it is what this
config measures.
"""

_base_ = 'mmpretrain::swin_transformer_v2/swinv2-tiny-w8_16xb64_in1k-256px.py'

load_from = (
    'https://download.openmmlab.com/mmclassification/v0/swin-v2/'
    'swinv2-tiny-w8_3rdparty_in1k-256px_20220803-e318968f.pth'
)
model = dict(backbone=dict(init_cfg=None))  # load_from loads these weights
train_cfg = dict(max_epochs=120)
optim_wrapper = dict(optimizer=dict(lr=5e-5 * 1024 / 512), clip_grad=dict(max_norm=5.0))
