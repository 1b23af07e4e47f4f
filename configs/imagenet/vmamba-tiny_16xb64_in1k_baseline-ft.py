"""Control of *_denoiserep.py: VMamba-T, trained on without denoising.

Ours, after the official SwinV2-T recipe: 120 epochs of AdamW at 5e-5 per 512 images. What more training alone does to
the model is what this config measures. Run vmamba-tiny_16xb64_in1k.py first, or convert the released checkpoint.
"""

_base_ = './vmamba-tiny_16xb64_in1k.py'

load_from = 'work_dirs/vmamba-tiny_16xb64_in1k/epoch_300.pth'
train_cfg = dict(max_epochs=120)
optim_wrapper = dict(optimizer=dict(lr=5e-5 * 1024 / 512))
