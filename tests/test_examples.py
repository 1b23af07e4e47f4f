"""The examples in the docstrings of the library run, and give what they say."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import mmdenoiserep
from helpers import ROOT
from mmdenoiserep import apis, core
from tiny_datasets import write_fashion_mnist, write_image, write_market1501


def examples(package):
    """Yields the examples of every module of a package."""
    finder = doctest.DocTestFinder(exclude_empty=True)
    for info in pkgutil.walk_packages(package.__path__, f'{package.__name__}.'):
        module = importlib.import_module(info.name)
        yield from (test for test in finder.find(module, info.name) if test.examples)


EXAMPLES = [*examples(core), *examples(apis)]


def known():
    """Returns the names that the examples take for known: torch, and what the library offers."""
    names = dict(torch=torch, nn=nn, Path=Path)
    for info in pkgutil.iter_modules(apis.__path__, f'{apis.__name__}.'):
        module = importlib.import_module(info.name)
        names |= {name: value for name, value in vars(module).items() if getattr(value, '__module__', '') == info.name}
    for module in (core, mmdenoiserep):
        names |= {name: getattr(module, name) for name in module.__all__}
    return names


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A folder with the configs, tiny data sets of the demo, and four images."""
    folder = tmp_path_factory.mktemp('examples')
    (folder / 'configs').symlink_to(ROOT / 'configs')
    write_fashion_mnist(folder / 'work_dirs/fashion-mnist')
    write_market1501(folder / 'work_dirs/fashion-reid')
    for i in range(4):
        write_image(folder / f'images/{i}.png', np.random.default_rng(i))
    return folder


@pytest.mark.parametrize('example', EXAMPLES, ids=lambda example: example.name.removeprefix('mmdenoiserep.'))
def test_an_example_runs(example, folder, tmp_path, monkeypatch):
    """In a folder of its own with the configs and data, after torch was seeded."""
    monkeypatch.chdir(tmp_path)
    for path in folder.iterdir():
        Path(path.name).symlink_to(path)
    torch.manual_seed(0)
    example.globs = known()
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    report = []
    runner.run(example, out=report.append)
    assert not runner.failures, ''.join(report)


def test_the_functions_that_users_call_have_examples():
    """Those of the core that take a model, and all functions of the APIs on the page."""
    names = {example.name for example in EXAMPLES}
    assert {f'mmdenoiserep.core.calibration.{name}' for name in ('solve.solve_denoisers', 'domain.fit_domain')} <= names
    documented = re.findall(r'^::: (mmdenoiserep\.apis\..*)$', (ROOT / 'docs/api.md').read_text(), re.MULTILINE)
    assert documented and set(documented) <= names
