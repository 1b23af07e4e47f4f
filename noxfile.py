"""The versions that the package works with, by one command: ``nox``; ``nox --list`` names the sessions.

``core`` builds environments of its own and downloads torch for each. ``stack`` and ``without`` stand on the environment
that nox runs in, which holds the compiled mmcv: ``.venv`` after ``make install``.
"""

import sys
import sysconfig
from pathlib import Path

import nox

nox.options.error_on_missing_interpreters = False  # a Python that is not here is skipped, and said to be
nox.options.reuse_existing_virtualenvs = True

CORE = Path('tests', 'core')
CALIBRATION = ('closed_form', 'collect', 'calibration_features', 'match', 'memory', 'moments', 'solve')
TORCH_ALONE = [
    CORE / 'utils' / 'test_lockstep.py',
    CORE / 'test_alone.py',
    *(CORE / 'calibration' / f'test_{name}.py' for name in CALIBRATION),
    *(CORE / 'method' / f'test_{name}.py' for name in ('correction', 'layers', 'sample', 'schedule', 'select')),
]
MMENGINE_ALONE = [
    CORE / 'files' / 'test_checkpoint.py',
    'tests/engine/test_fusion_hook.py',
    'tests/engine/test_resume.py',
]
BY_OBJECTS = 'tests/core/calibration/test_processes.py'
"""Needs numpy besides: torch 2.6 can't send objects between processes without it."""
STACK = ['tests/engine', 'tests/tools/test_tools.py']
"""Test files that meet mmengine most: its registries, hooks, runners, checkpoints and configs."""

PURELIB = 'import sysconfig; print(sysconfig.get_path("purelib"))'


@nox.session(python=['3.10', '3.11', '3.12', '3.13'])
@nox.parametrize('torch', ['2.6.0', '2.14.1'])
def core(session: nox.Session, torch: str) -> None:
    """The core with torch and greenlet, then with mmengine and no other library."""
    session.install('--constraint=requirements/dev.txt', f'torch=={torch}', 'pytest', '.')
    session.run('pytest', '--noconftest', *TORCH_ALONE)
    session.install('--constraint=requirements/openmmlab.txt', 'mmengine', 'setuptools<81')
    session.run('pytest', BY_OBJECTS, *MMENGINE_ALONE)


@nox.session
@nox.parametrize('mmengine', ['0.10.5', '0.10.7'])
def stack(session: nox.Session, mmengine: str) -> None:
    """All three libraries and the compiled mmcv of the present environment, with another mmengine before them."""
    here, own = (sysconfig.get_path('purelib'), Path(session.run('python', '-c', PURELIB, silent=True).strip()))
    (own / 'base.pth').write_text(f'import site; site.addsitedir({here!r})\n')
    session.install('--no-deps', f'mmengine=={mmengine}')
    session.run('python', '-m', 'pytest', *STACK)


@nox.session(python=False)
@nox.parametrize('library', ['mmengine', 'mmcv', 'mmdet', 'mmseg', 'mmpretrain'])
def without(session: nox.Session, library: str) -> None:
    """The present environment without one library."""
    session.run(sys.executable, '-m', 'pytest', 'tests/install/test_without_libraries.py', '-k', library)
