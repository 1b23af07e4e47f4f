"""The set-up script, with a stub in place of Python: what it repeats, what it takes up again, what it says."""

import re
import shutil
import subprocess

import pytest

from helpers import ROOT

STUB = """#!/bin/bash
case "$*" in
    "-m venv "*) mkdir -p "$3/bin" "$3/site" && cp "$0" "$3/bin/python" ;;
    *get_path*) echo .venv/site ;;
    *"-m pip"*) echo "$*" >> pip.log; if [ -f fail ] && [[ "$*" == *"$(cat fail)"* ]]; then exit 1; fi ;;
esac
"""


@pytest.fixture
def project(tmp_path):
    """A folder with the set-up script, its requirements, and a Python that only notes what pip is asked for."""
    shutil.copytree(ROOT / 'requirements', tmp_path / 'requirements')
    shutil.copy(ROOT / 'setup.py', tmp_path)
    (tmp_path / 'stub').write_text(STUB)
    (tmp_path / 'stub').chmod(0o755)
    return tmp_path


def install(project, python='./stub', **env):
    log = project / 'pip.log'
    log.write_text('')
    command = ['bash', 'requirements/install.sh']
    env |= dict(PATH='/usr/bin:/bin', PYTHON=python)
    result = subprocess.run(command, cwd=project, capture_output=True, text=True, env=env)
    return result.returncode, result.stdout + result.stderr, log.read_text().splitlines()


def test_the_second_time_nothing_is_installed(project):
    code, printed, calls = install(project)
    assert code == 0 and 'ready' in printed
    order = ['torch.txt', 'openmmlab.txt', 'torchvision', 'mmcv==2.1.0', 'dev.txt', 'docs.txt', '-e .']
    assert [next(word for word in order if word in call) for call in calls] == order
    assert install(project) == (0, '', [])


def test_the_way_out_of_the_cuda_download_is_said(project):
    _, printed, calls = install(project)
    (index,) = re.findall(r'TORCH_INDEX=(\S+) make install', printed)
    assert not any('index' in call for call in calls)
    shutil.rmtree(project / '.venv')
    _, printed, calls = install(project, TORCH_INDEX=index)
    assert 'make install' not in printed
    assert all(f'--extra-index-url {index} ' in call for call in calls)


def test_an_interrupted_install_goes_on_where_it_stopped(project):
    (project / 'fail').write_text('mmcv==')
    code, printed, _ = install(project)
    assert code == 1 and 'this step failed: Compiling mmcv' in printed
    (project / 'fail').unlink()
    code, _, calls = install(project)
    assert code == 0
    assert 'mmcv==2.1.0' in calls[0] and len(calls) == 4


def test_a_changed_pin_repeats_its_step_and_what_builds_on_it(project):
    install(project)
    with open(project / 'requirements/openmmlab.txt', 'a') as file:
        file.write('another==1.0\n')
    _, _, calls = install(project)
    assert 'openmmlab.txt' in calls[0]


def test_the_stacks(project):
    _, _, calls = install(project, STACK='onedl')
    assert [word for word in ('onedl.txt', 'onedl-mmcv==', 'openmmlab.txt') if word in ''.join(calls)] == [
        'onedl.txt',
        'onedl-mmcv==',
    ]
    assert install(project) == install(project, STACK='onedl') == (0, '', [])  # make test, make lint stay with it
    code, printed, calls = install(project, STACK='openmmlab')
    assert code == 1 and calls == []
    assert '.venv holds the stack onedl' in printed and 'delete .venv to build it with STACK=openmmlab' in printed
    shutil.rmtree(project / '.venv')
    code, printed, calls = install(project, STACK='mmlab')
    assert code == 1 and calls == [] and 'there is no stack mmlab; STACK is openmmlab or onedl' in printed


def test_an_environment_from_before_there_were_stacks(project):
    install(project)
    (project / '.venv/.install/stack').unlink()
    assert install(project) == (0, '', [])
    assert install(project, STACK='onedl')[0] == 1


def test_no_python(project):
    code, printed, _ = install(project, python='python-that-is-not-there')
    assert code == 1 and 'no Python 3.10 to 3.12' in printed
