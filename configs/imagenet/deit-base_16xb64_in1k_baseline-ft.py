"""Control of *_denoiserep.py: the released ViT-B/16 (DeiT), trained on without denoising.

Ours, after the official SwinV2-T recipe: 120 epochs of AdamW at 5e-5 and at the end 5e-6, both per 512 images,
20 epochs of warm-up, clipping at 5. The averaged weights (EMAHook) of the base stay.
The released checkpoint has top-1 81.76 (mmpretrain's metafile); what more training alone does to it is what this
config measures.
"""

_base_ = 'mmpretrain::deit/deit-base_16xb64_in1k.py'

load_from = 'https://download.openmmlab.com/mmclassification/v0/deit/deit-base_pt-16xb64_in1k_20220216-db63c16c.pth'
model = dict(backbone=dict(init_cfg=None))  # load_from loads these weights
train_cfg = dict(max_epochs=120)
optim_wrapper = dict(optimizer=dict(lr=5e-5 * 1024 / 512))
