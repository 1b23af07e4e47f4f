"""Visualization: what it refuses before it reads anything, and a single layer by its name."""

from pathlib import Path

import pytest
import torch
from mmengine.config import Config

from helpers import ROOT
from mmdenoiserep.apis.config import load_config
from mmdenoiserep.apis.model import build_model
from mmdenoiserep.apis.visualization import Visualization
from mmdenoiserep.core import InputError
from tiny_datasets import write_fashion_mnist


@pytest.mark.parametrize(
    ('arguments', 'words'),
    [
        (dict(corruption='foo'), "corruption must be one of noise, blur, .*, got 'foo'"),
        (dict(corruption='clean'), "corruption must be one of noise, blur, .*, got 'clean'"),
        (dict(severity=2), 'severity 2 does not work for noise'),
        (dict(seed=-1), 'seed must be a whole number of 0 or more, got -1'),
        (dict(num_images=1), 'num_images must be a whole number of 2 or more, got 1'),
        (dict(shown=0), 'shown must be a whole number of 1 or more, got 0'),
        (dict(batch_size=0), 'batch_size must be a whole number of 1 or more, got 0'),
    ],
)
def test_arguments_that_do_not_work(arguments, words):
    with pytest.raises(InputError, match=words):
        Visualization(Config({}), 'no.pth', 'no.pth', **arguments)


def test_one_layer_may_be_named_without_a_list(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_fashion_mnist(Path('work_dirs/fashion-mnist'))
    cfg = load_config(ROOT / 'configs/demo/vit_fashion-mnist.py')
    torch.save(build_model(cfg).state_dict(), 'in.pth')
    how = dict(num_images=2, device='cpu')
    assert Visualization(cfg, 'in.pth', Path('in.pth'), spectra='layers.0.attn.qkv', **how).spectra == [
        'layers.0.attn.qkv'
    ]
    with pytest.raises(InputError, match='the backbone has no layer nope; near names'):
        Visualization(cfg, 'in.pth', 'in.pth', spectra='nope', **how)
