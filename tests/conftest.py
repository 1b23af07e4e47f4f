"""Set-up of all tests."""

import shutil
import subprocess
import sys

import pytest
import torch
from mmengine.logging import MMLogger
from mmengine.registry import DefaultScope

from helpers import ROOT
from mmdenoiserep.apis.config import name_config_packages

torch.set_num_threads(1)  # small layers: threads cost more than they bring
name_config_packages()  # for tests that read configs by mmengine alone


def pytest_addoption(parser):
    parser.addoption('--device', default='cpu', help='device of the tests marked gpu, such as cuda (default: cpu)')


@pytest.fixture(autouse=True)
def no_default_scope():
    """Lets every test start without a default scope; runs of earlier tests leave theirs behind."""
    DefaultScope._instance_dict.clear()


@pytest.fixture(autouse=True)
def log_level():
    """Lets every test see the log; tools that earlier tests ran in this process have silenced it."""
    for logger in MMLogger._instance_dict.values():
        logger.setLevel('INFO')


@pytest.fixture
def clean_allow_list():
    """Gives a test torch's own list of what ``weights_only`` lets through, and leaves what it found."""
    allowed = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    yield
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(allowed)


@pytest.fixture(scope='session')
def sdist(tmp_path_factory):
    """The sdist of a copy of the checkout, which is left beside it as ``source``; built without a network."""
    root = tmp_path_factory.mktemp('dist')
    not_source = shutil.ignore_patterns('.*', '__pycache__', '*.egg-info', 'build', 'dist', 'work_dirs', 'data')
    shutil.copytree(ROOT, root / 'source', ignore=not_source)
    build = f'from setuptools import build_meta; build_meta.build_sdist({str(root)!r})'
    subprocess.run([sys.executable, '-c', build], cwd=root / 'source', check=True, capture_output=True)
    (path,) = root.glob('*.tar.gz')
    return path


@pytest.fixture(scope='session')
def wheel(sdist):
    """The wheel of the sdist."""
    options = ['--no-cache-dir', '--no-index', '--no-deps', '--no-build-isolation', '--wheel-dir', sdist.parent]
    subprocess.run([sys.executable, '-m', 'pip', 'wheel', *options, sdist], check=True, capture_output=True)
    (path,) = sdist.parent.glob('*.whl')
    return path
