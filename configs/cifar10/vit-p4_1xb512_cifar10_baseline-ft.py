"""Control of *_denoiserep.py: the ViT of vit-p4_1xb512_cifar10.py, trained on without denoising.

200 epochs of Adam at 1e-4 with a cosine: the official recipe, less the denoisers. What more training alone does to the
model is what this config measures. Run vit-p4_1xb512_cifar10.py first.
"""

_base_ = './vit-p4_1xb512_cifar10.py'

load_from = 'work_dirs/vit-p4_1xb512_cifar10/epoch_300.pth'
train_cfg = dict(max_epochs=200)
