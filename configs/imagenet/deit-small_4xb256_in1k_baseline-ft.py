"""Control of *_denoiserep.py: the released ViT-S/16 (DeiT), trained on without denoising.

Ours, after the official SwinV2-T recipe: 120 epochs of AdamW at 5e-5 and at the end 5e-6, both per 512 images,
20 epochs of warm-up, clipping at 5.
The released checkpoint has top-1 80.69 (mmpretrain's metafile); what more training alone does to it is what this
config measures.
"""

_base_ = 'mmpretrain::deit/deit-small_4xb256_in1k.py'

load_from = 'https://download.openmmlab.com/mmclassification/v0/deit/deit-small_pt-4xb256_in1k_20220218-9425b9bb.pth'
model = dict(backbone=dict(init_cfg=None))  # load_from loads these weights
train_cfg = dict(max_epochs=120)
optim_wrapper = dict(optimizer=dict(lr=5e-5 * 1024 / 512))
