"""Files of moments, and the fingerprint of the weights that they belong to."""

import pytest
import torch

from helpers import relative
from mmdenoiserep.core import CheckpointError, Moments, fingerprint, load_moments, save_moments


def test_moments_come_back_from_their_file(tmp_path):
    generator = torch.Generator().manual_seed(0)
    moments = {f'{g}': Moments.of(torch.randn(g, 5, 40, generator=generator) + 3) for g in (1, 3)}
    save_moments(moments, tmp_path / 'm.pth', dict(images=40))
    loaded, meta = load_moments(tmp_path / 'm.pth')
    assert meta == dict(images=40) and loaded.keys() == moments.keys()
    for name, seen in moments.items():
        assert loaded[name].count == 40
        assert torch.equal(loaded[name].mean, seen.mean)
        assert relative(loaded[name].covariance, seen.covariance) < 1e-6
        assert relative(loaded[name].root(), seen.root()) < 1e-6


@pytest.mark.parametrize(
    'change',
    [
        dict(mean=torch.zeros(1, 4)),
        dict(root=None),
        dict(count=0 / torch.zeros(())),
        dict(count=-5),
        dict(count=2**70),
    ],
)
def test_damaged_files_of_moments_are_refused(change, tmp_path):
    save_moments({'fc': Moments.of(torch.randn(1, 5, 40))}, tmp_path / 'm.pth', {})
    content = torch.load(tmp_path / 'm.pth', weights_only=True)
    content['moments']['fc'] |= change
    torch.save(content, tmp_path / 'm.pth')
    with pytest.raises(CheckpointError, match='no usable moments of fc'):
        load_moments(tmp_path / 'm.pth')[0]['fc']


def test_a_fingerprint_knows_names_and_values():
    state = dict(a=torch.ones(3), b=torch.zeros((), dtype=torch.int64), c=torch.ones(2, dtype=torch.bfloat16))
    assert fingerprint(state) == fingerprint(dict(reversed(state.items())))
    changed = [
        state | dict(a=torch.tensor([1.0, 1.0, 1.0000001])),
        state | dict(d=torch.ones(1)),
        dict(list(state.items())[1:]),
    ]
    assert len({fingerprint(s) for s in [state, *changed]}) == 4
    assert fingerprint(state | {'head._extra_state': dict(scale=2)}) == fingerprint(state)
