"""The examples in the docstrings of the library run, and give what they say."""

import doctest
import importlib
import pkgutil

import pytest
import torch
from torch import nn

import mmdenoiserep
from helpers import ROOT
from mmdenoiserep import apis, core
from mmdenoiserep.apis import backbones, config, export, fusion, model


def examples(package):
    """Yields the examples of every module of a package."""
    finder = doctest.DocTestFinder(exclude_empty=True)
    for info in pkgutil.walk_packages(package.__path__, f'{package.__name__}.'):
        module = importlib.import_module(info.name)
        yield from (test for test in finder.find(module, info.name) if test.examples)


EXAMPLES = [*examples(core), *examples(apis)]


def known():
    """Returns the names that the examples take for known: torch, and what the library offers."""
    names = dict(torch=torch, nn=nn)
    for module in (core, mmdenoiserep):
        names |= {name: getattr(module, name) for name in module.__all__}
    for module in (backbones, config, export, fusion, model):
        names |= {name: value for name, value in vars(module).items() if name[0] != '_' and callable(value)}
    return names


@pytest.mark.parametrize('example', EXAMPLES, ids=lambda example: example.name.removeprefix('mmdenoiserep.'))
def test_an_example_runs(example, tmp_path, monkeypatch):
    """In a folder with the configs, after torch was seeded."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'configs').symlink_to(ROOT / 'configs')
    torch.manual_seed(0)
    example.globs = known()
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    report = []
    runner.run(example, out=report.append)
    assert not runner.failures, ''.join(report)


def test_the_functions_that_users_call_have_examples():
    """Those that take a model or a config."""
    names = {example.name.rpartition('.')[2] for example in EXAMPLES}
    assert {'load_config', 'open_model', 'fuse_file', 'export_file', 'solve_denoisers', 'fit_domain'} <= names
