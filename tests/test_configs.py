"""The shipped configs at their full size."""

from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope

import mmdenoiserep  # noqa: F401

CONFIGS = Path(__file__).resolve().parents[1] / 'configs'
PAIRS = [
    ('mask-rcnn_swin_denoiserep.py', 'mask-rcnn_swin_baseline-ft.py'),
    ('demo/mask-rcnn_swin_denoiserep_scenes.py', 'demo/mask-rcnn_swin_baseline-ft_scenes.py'),
]


@pytest.mark.parametrize(('denoised', 'control'), PAIRS)
def test_a_vanilla_checkpoint_misses_only_denoisers(denoised, control):
    """Built at full size, a vanilla state dict fits the denoised model but for denoiser.*, and back without them."""
    init_default_scope('mmdet')
    model = MODELS.build(Config.fromfile(CONFIGS / denoised).model)
    vanilla = MODELS.build(Config.fromfile(CONFIGS / control).model)
    missing, unexpected = model.load_state_dict(vanilla.state_dict(), strict=False)
    assert not unexpected
    assert missing and all('.denoiser.' in key for key in missing)
    assert set(missing) == {key for key in model.state_dict() if '.denoiser.' in key}
    image = torch.randn(1, 3, 64, 96)
    model.eval(), vanilla.eval()
    with torch.no_grad():
        for ours, theirs in zip(model.extract_feat(image), vanilla.extract_feat(image), strict=True):
            assert torch.equal(ours, theirs), 'a denoiser starts as nothing'


@pytest.mark.parametrize(('denoised', 'control'), PAIRS)
def test_the_control_differs_in_denoising_only(denoised, control):
    """Data, schedule, seed and the optimizer of the base are the same in both configs of a pair."""
    ours, theirs = (Config.fromfile(CONFIGS / name).to_dict() for name in (denoised, control))
    assert ours['model']['backbone'].pop('type') == 'DenoiseRepBackbone'
    assert ours['model'].pop('backbone')['backbone'] == theirs['model'].pop('backbone')
    keys = ours['optim_wrapper']['paramwise_cfg']['custom_keys']
    assert keys.pop('.denoiser.')
    if not keys:
        ours['optim_wrapper'].pop('paramwise_cfg')
    for key in ('custom_imports', 'custom_hooks', 'filename'):
        ours.pop(key, None), theirs.pop(key, None)
    assert ours == theirs
