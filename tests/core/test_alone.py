"""The core without OpenMMLab, as the README shows it."""

import subprocess
import sys

SCRIPT = """
import sys
for name in ('mmengine', 'mmcv', 'mmdet', 'mmseg', 'mmpretrain'):
    sys.modules[name] = None
import torch
from mmdenoiserep import apply_denoiserep, fuse_model, verify_fusion
import mmdenoiserep

assert not hasattr(mmdenoiserep, 'DenoiseRepBackbone')
model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 3, padding=1))
report = apply_denoiserep(model, 'all')
images = torch.randn(2, 3, 16, 16)
optimizer = torch.optim.Adam([p for n, p in model.named_parameters() if 'denoiser' in n], lr=1e-3)
for _ in range(3):
    loss = model[0].denoise_loss(images) + model[2].denoise_loss(torch.relu(model[0](images)))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
assert model[0].denoiser.weight.abs().max() > 0
fused = fuse_model(model)
assert type(fused[0]) is torch.nn.Conv2d
verification = verify_fusion(model)
assert verification.ok
print(report, verification, sep='\\n')
"""


def test_the_core_needs_torch_only(tmp_path):
    """Convert, train by hand, fuse and verify, with no OpenMMLab package to import."""
    command = [sys.executable, '-W', 'ignore', '-c', SCRIPT]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert '2 layers denoised, steps 2 to 1 in execution order' in result.stdout
