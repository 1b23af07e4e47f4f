"""load_config: the paths, options and imports that are refused, and what a run gets by default."""

from pathlib import Path

import pytest

from mmdenoiserep.apis.config import load_config
from mmdenoiserep.apis.errors import ConfigError


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path('config.py').write_text('a = 1\n')
    Path('imports.py').write_text("custom_imports = dict(imports=['torch.nowhere'])\n")


@pytest.mark.parametrize(
    ('path', 'options', 'words'),
    [
        ('config.py', ['--amp=True'], "an option must be KEY=VALUE, got '--amp=True'"),
        ('config.py', ['-h=1'], "got '-h=1'"),
        ('config.py', ['--help=1'], "got '--help=1'"),
        ('config.py', ['a=2', '--options=5'], "got '--options=5'"),
        ('config.py', ['=5'], "got '=5'"),
        ('config.py', ['a'], "got 'a'"),
        ('config.py', [5], 'got 5'),
        ('config.py', 'a=2', "got 'a'"),
        ('config.py', ['a=[1,'], 'the options cannot be read'),
        ('config.py', ['a.b=1'], 'the options do not fit config.py'),
        ('', None, "the config '' cannot be read: it is no file"),
        ('.', None, 'the config . cannot be read: it is no file'),
        (None, None, 'the config None cannot be read: it is no file'),
        ('imports.py', None, 'torch.nowhere'),
    ],
)
def test_what_is_refused(path, options, words):
    with pytest.raises(ConfigError) as caught:
        load_config(path, options)
    assert words in str(caught.value) and 'site-packages' not in str(caught.value)


def test_a_run_has_a_launcher_and_a_work_dir():
    cfg = load_config('config.py', ['b="-1=x"'], work_dir=Path('w'))
    assert cfg.work_dir == 'w' and cfg.b == '-1=x' and 'launcher' not in cfg
    cfg = load_config('config.py', launcher='pytorch')
    assert cfg.work_dir == 'work_dirs/config' and cfg.launcher == 'pytorch'
    assert load_config('config.py', ['work_dir=v'], launcher='none').work_dir == 'v'
