"""The pages: what they tell to type exists, the API page is complete, and the site is built, with the notebook run."""

import importlib
import re
import runpy
import shlex
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from helpers import ROOT
from mmdenoiserep import core, engine
from mmdenoiserep.core import DenoiseLayer

COMMAND = re.compile(r'^(?:    )?(?:\.venv/bin/)?((?:python tools/|python -m studies|make |nox\b).*)$', re.MULTILINE)
COMMANDS = [
    (page.name, line)
    for page in (*sorted((ROOT / 'docs').glob('*.md')), ROOT / 'configs/README.md', ROOT / 'CONTRIBUTING.md')
    for line in COMMAND.findall(page.read_text(encoding='utf-8'))
]
"""Those in blocks, fenced or indented; the launch scripts' are in test_launchers.py."""


@pytest.mark.parametrize('page,line', COMMANDS)
def test_a_command_is_understood(page, line, monkeypatch):
    """A target of the Makefile, or a tool that takes these options, with a config of this repository."""
    program, *rest = shlex.split(line, comments=True)
    if program == 'nox':
        sessions = re.findall(r'^def (\w+)\(session', (ROOT / 'noxfile.py').read_text(), re.MULTILINE)
        assert not rest or (rest[0] == '-s' and re.match(r'\w+', rest[1])[0] in sessions)
        return
    target, *args = rest
    if program == 'make':
        assert re.search(rf'^{target}:', (ROOT / 'Makefile').read_text(encoding='utf-8'), re.MULTILINE)
        return
    assert program == 'python'
    if target == '-m':
        target, *args = args
        tool = importlib.import_module(target)
    else:
        tool = SimpleNamespace(**runpy.run_path(ROOT / target))
    monkeypatch.setattr(sys, 'argv', [target, *args])
    if not hasattr(tool, 'parse_args'):
        assert not args
        return
    read = tool.parse_args()
    assert not hasattr(read, 'config') or read.config in ('my_config.py', 'CONFIG') or (ROOT / read.config).is_file()


def test_the_recipe_in_plain_pytorch():
    page = (ROOT / 'docs/own-model.md').read_text(encoding='utf-8')
    fit, train = re.findall(r'```python\n((?:import copy|from mmdenoiserep\.core).*?)```', page, re.DOTALL)
    torch.manual_seed(0)
    layers = torch.nn.Linear(6, 12), torch.nn.GELU(), torch.nn.Linear(12, 8), torch.nn.GELU(), torch.nn.Linear(8, 4)
    clean = torch.randn(2000, 6) @ torch.randn(6, 6)
    new = clean[:1000] + 2 * torch.randn(1000, 6) + 1
    model = torch.nn.Sequential(*layers)
    names = dict(model=model, clean_batches=clean.split(500), new_images=new)
    exec(fit, names)
    with torch.no_grad():
        assert not torch.allclose(names['before'](new), model(new), rtol=0.1, atol=0.1)
    exec(train, names | dict(loader=[(clean, 0)] * 3, label_loss=lambda output, _: output.square().mean()))
    denoisers = [layer.denoiser for layer in model.modules() if isinstance(layer, DenoiseLayer)]
    assert len(denoisers) == 3 and all(denoiser.matrix().any() for denoiser in denoisers)


def test_the_api_page_has_every_public_name():
    documented = re.findall(r'^::: (\S+)$', (ROOT / 'docs/api.md').read_text(), re.MULTILINE)
    public = {f'mmdenoiserep.core.{name}' for name in core.__all__}
    public |= {f'mmdenoiserep.engine.{name}' for name in engine.__all__}
    assert public <= set(documented) and len(set(documented)) == len(documented)
    for path in set(documented) - public:
        module, _, name = path.rpartition('.')
        assert hasattr(importlib.import_module(module), name), path


@pytest.mark.slow  # as `make docs` does
def test_the_site_is_built(tmp_path):
    """Strictly: every page is in the navigation, every link leads somewhere, and every cell of the notebook works."""
    build = [sys.executable, '-m', 'mkdocs', 'build', '--site-dir', str(tmp_path)]
    result = subprocess.run(build, cwd=ROOT, text=True, capture_output=True, timeout=600)
    assert result.returncode == 0, result.stderr[-4000:]
    assert 'domain fit   clean' in (tmp_path / 'quickstart.html').read_text(encoding='utf-8')
