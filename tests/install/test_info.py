"""What a bug report needs: every version, and the libraries that do not import."""

from importlib.metadata import packages_distributions, version

import torch

import mmdenoiserep
from tools_helpers import python


def info(cwd, **env):
    lines = python('-m', 'mmdenoiserep.info', cwd=cwd, env=env).splitlines()
    return dict(line.split(': ', 1) for line in lines)


def package(module):
    (name,) = set(packages_distributions()[module])
    return f'{name} {version(name)}'


def test_the_versions(tmp_path):
    found = info(tmp_path)
    assert found['mmdenoiserep'] == mmdenoiserep.__version__
    assert found['torch'].startswith(f'{torch.__version__}, built with ')
    assert found['mmseg'] == package('mmseg')
    assert found['mmcv.ops'].startswith('compiled by ')
    assert found['numpy'] == version('numpy')
    assert not any('not import' in text or 'not installed' in text for text in found.values())


def test_a_library_that_does_not_import(tmp_path):
    (tmp_path / 'mmdet.py').write_text("raise AssertionError('mmcv is too new')\n")
    found = info(tmp_path, PYTHONPATH=str(tmp_path))
    assert found['mmdet'] == f'{package("mmdet")}, does not import: AssertionError: mmcv is too new'
    assert found['mmcv'] == package('mmcv')


def test_a_library_without_metadata(tmp_path):
    (tmp_path / 'mmdet.py').write_text("__version__ = '9.9'\n")
    code = "import mmdenoiserep.info as info; print(info._describe_module('mmdet', {}))"
    printed = python('-c', code, cwd=tmp_path, env=dict(PYTHONPATH=str(tmp_path)))
    assert printed.strip() == 'installed without metadata, version 9.9'
