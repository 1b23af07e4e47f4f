"""VMamba-B on ImageNet-1k, from scratch by the recipe of VMamba-T. Its authors give top-1 83.9.

Their checkpoint saves the training: ``python tools/model_converters/convert_checkpoint.py vmamba
vssm_base_0229_ckpt_epoch_237.pth work_dirs/vmamba-base_16xb64_in1k/epoch_300.pth``.
Untested at full size: no result is claimed.
"""

_base_ = './vmamba-tiny_16xb64_in1k.py'

model = dict(backbone=dict(arch='base', drop_path_rate=0.6), head=dict(in_channels=1024))
