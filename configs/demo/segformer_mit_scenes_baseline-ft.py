"""Control of segformer_mit_scenes_denoiserep.py: the baseline, fine-tuned for 300 iterations without denoising."""

_base_ = './segformer_mit_scenes.py'

load_from = 'work_dirs/segformer_mit_scenes/iter_1000.pth'
train_cfg = dict(max_iters=300)
optim_wrapper = dict(optimizer=dict(lr=1e-4))
param_scheduler = [dict(type='CosineAnnealingLR', eta_min=1e-6, by_epoch=False, begin=0, end=300, T_max=300)]
