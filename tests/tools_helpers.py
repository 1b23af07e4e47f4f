"""Runs tools and studies as commands: in this process, and in one of their own."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from denoiserep_commands import launch
from helpers import ROOT


def find_tool(name):
    """Returns the path of a tool, or of a module of studies."""
    return next(path for folder in ('tools', 'studies') for path in (ROOT / folder).rglob(f'{name}.py'))


def run_tool(tool, *args, cwd=None):
    """Runs a tool in this process, by its name, or a module of which parts may be replaced; errors come as they are."""
    path = find_tool(tool) if isinstance(tool, str) else Path(tool.__file__)
    start, given, known = os.getcwd(), sys.argv, sys.path[:]
    sys.argv = [str(path), *map(str, args)]
    try:
        os.chdir(cwd or start)
        if isinstance(tool, str):
            runpy.run_path(str(path), run_name='__main__')
        else:
            launch(tool.main)
    finally:
        os.chdir(start)
        sys.argv, sys.path[:] = given, known


def sentence(tool, *args, cwd=None):
    """Runs a tool on bad input in this process and returns the sentence that it ends with, without its name."""
    with pytest.raises(SystemExit) as stopped:
        run_tool(tool, *args, cwd=cwd)
    name, _, text = str(stopped.value.code).partition(': ')
    assert name == (tool if isinstance(tool, str) else Path(tool.__file__).stem), stopped.value.code
    assert text.isprintable() and '\n' not in text
    return text


def python(*args, cwd, code=0, env=(), checkout=True):
    """Runs Python and returns all that it printed; this checkout comes behind the PYTHONPATH of ``env``."""
    env = {**os.environ, 'OMP_NUM_THREADS': '1', 'PYTHONPATH': '', **dict(env)}
    if checkout:
        env['PYTHONPATH'] = os.pathsep.join([*map(str, filter(None, [env['PYTHONPATH']])), str(ROOT)])
    command = [sys.executable, '-W', 'ignore', *map(str, args)]
    result = subprocess.run(command, cwd=cwd, env=env, text=True, capture_output=True, timeout=900)
    output = result.stdout + result.stderr
    assert result.returncode == code, output[-4000:]
    return output


def run_process(name, *args, cwd, code=0, env=()):
    """Runs a tool, or a module of studies, as a user does."""
    path = find_tool(name)
    module = ['-m', '.'.join(path.relative_to(ROOT).with_suffix('').parts)]
    return python(*(module if path.is_relative_to(ROOT / 'studies') else [path]), *args, cwd=cwd, code=code, env=env)


def with_random_denoisers(source, target):
    """Rewrites a checkpoint with denoisers large enough to change what the model computes."""
    checkpoint = torch.load(source, weights_only=False)
    generator = torch.Generator().manual_seed(0)
    for key, value in checkpoint['state_dict'].items():
        if '.denoiser.' in key:
            value.copy_(0.1 * torch.randn(value.shape, generator=generator) / value.shape[-1] ** 0.5)
    torch.save(checkpoint, target)
    return target


def metrics(work_dir):
    """Returns the numbers of the last evaluation in a work dir, without its timings."""
    newest = max(work_dir.glob('*/*.json'), key=lambda path: path.stat().st_mtime)
    line = json.loads(newest.read_text().splitlines()[-1])
    return {key: value for key, value in line.items() if key not in ('time', 'data_time', 'step')}
