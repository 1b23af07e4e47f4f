"""Runs tools and studies as commands: in this process, and in one of their own."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from denoiserep_commands import launch
from helpers import ROOT


def find_tool(name):
    """Returns the path of a tool, or of a module of studies."""
    return next(path for folder in ('tools', 'studies') for path in (ROOT / folder).rglob(f'{name}.py'))


def run_tool(tool, *args, cwd=None):
    """Runs a tool in this process; it ends with an error or SystemExit where its own process would end so.

    Args:
        tool: Name of a tool or of a module of studies, or such a module, parts of which may be replaced.
        *args: Its arguments.
        cwd: Folder to run in.
    """
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


def python(*args, cwd, code=0, env=()):
    """Runs Python on this checkout, with its warnings off, and returns all that it printed.

    Args:
        *args: Its arguments.
        cwd: Folder to run in.
        code: The expected exit code.
        env: Further variables of the environment; this checkout comes behind their ``PYTHONPATH``.
    """
    env = {**os.environ, 'OMP_NUM_THREADS': '1', **dict(env)}
    env['PYTHONPATH'] = os.pathsep.join([*map(str, filter(None, [dict(env).get('PYTHONPATH')])), str(ROOT)])
    command = [sys.executable, '-W', 'ignore', *map(str, args)]
    result = subprocess.run(command, cwd=cwd, env=env, text=True, capture_output=True, timeout=600)
    output = result.stdout + result.stderr
    assert result.returncode == code, output[-4000:]
    return output


def run_process(name, *args, cwd, code=0, env=()):
    """Runs a tool, or a module of studies, as a user does; see :func:`python`."""
    path = find_tool(name)
    module = ['-m', '.'.join(path.relative_to(ROOT).with_suffix('').parts)]
    return python(*(module if path.is_relative_to(ROOT / 'studies') else [path]), *args, cwd=cwd, code=code, env=env)
