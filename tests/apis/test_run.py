"""train and test as functions: with what load_config returns, without a launcher, and what they refuse first."""

import pickle
from pathlib import Path

import pytest
import torch

from helpers import ROOT
from mmdenoiserep.apis import run
from mmdenoiserep.apis.config import load_config
from mmdenoiserep.apis.model import build_model
from mmdenoiserep.core import InputError
from tiny_datasets import write_fashion_mnist

CONFIG = ROOT / 'configs/demo/vit_fashion-mnist.py'
OPTIONS = ['log_level=ERROR', 'load_from=None', 'train_cfg.max_iters=1', 'train_cfg.val_interval=1']


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path('file').touch()


def test_a_config_without_a_launcher_runs():
    write_fashion_mnist(Path('work_dirs/fashion-mnist'))
    cfg = load_config(CONFIG, OPTIONS)
    run.resume(cfg)
    run.train(cfg)
    assert cfg.launcher == 'none' and Path('work_dirs/vit_fashion-mnist/iter_1.pth').is_file()
    cfg = load_config(CONFIG, OPTIONS, work_dir=Path('tested'))
    torch.save(build_model(cfg).state_dict(), 'in.pth')
    run.test(cfg, Path('in.pth'), Path('new/out.pkl'))
    assert pickle.loads(Path('new/out.pkl').read_bytes()) and list(Path('tested').glob('*/*.json'))


@pytest.mark.parametrize(
    ('call', 'words'),
    [
        (lambda cfg: run.train(CONFIG), 'cfg must be a Config'),
        (lambda cfg: run.test(CONFIG, 'file'), 'cfg must be a Config'),
        (lambda cfg: run.test(cfg, Path('no.pth')), 'the checkpoint no.pth does not exist'),
        (lambda cfg: run.test(cfg, 'file', out='file/x.pkl'), 'the folder file cannot be written to'),
        (lambda cfg: run.test(cfg, 'file', out='/proc/x.pkl'), 'the folder /proc cannot be written to'),
        (lambda cfg: run.test(cfg, 'file', out='x.txt'), 'x.txt must end with .pkl or .pickle'),
        (lambda cfg: run.resume(cfg, Path('no.pth')), 'the checkpoint no.pth does not exist'),
        (
            lambda cfg: run.train(cfg.merge_from_dict(dict(launcher='foo')) or cfg),
            'launcher must be one of none, pytorch',
        ),
        (
            lambda cfg: run.train(cfg.merge_from_dict(dict(work_dir='file/w')) or cfg),
            'the folder file/w cannot be written to',
        ),
    ],
)
def test_arguments_that_do_not_work(call, words):
    with pytest.raises(InputError, match=words):
        call(load_config(CONFIG, OPTIONS))
    assert [path.name for path in Path().iterdir()] == ['file']
