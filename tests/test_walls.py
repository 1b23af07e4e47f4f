"""Who imports whom: the core torch and greenlet, inner parts no outer ones, tools and the package not each other."""

import ast
import sys
from pathlib import Path

import pytest

from helpers import ROOT

PACKAGE = ROOT / 'mmdenoiserep'
LAYERS = [
    ['core.utils'],
    ['core.method'],
    ['core.fusing'],
    ['core.calibration'],
    ['core.files'],
    ['core'],
    ['engine'],
    ['models', 'datasets', 'evaluation'],
    ['tasks'],
    ['apis'],
    ['mmdenoiserep'],
]
"""Parts of the package from the inside out; those of one row know nothing of each other."""


def modules(folder):
    return sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob('*.py'))


def tree(path):
    return ast.parse((ROOT / path).read_text(encoding='utf-8'))


def imports(path):
    """Returns the full names of all that a file imports, wherever it does."""
    found = []
    package = Path(path).parent.parts
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else ()
            module = '.'.join([*start, *filter(None, [node.module])])
            found += [f'{module}.{alias.name}' for alias in node.names]
    return found


def layer(name):
    """Returns the row of LAYERS and the part to which a name in the package belongs."""
    inner = name.removeprefix('mmdenoiserep').lstrip('.')
    for number, row in enumerate(LAYERS):
        for part in row:
            if part == 'mmdenoiserep' or inner == part or inner.startswith(f'{part}.'):
                return number, part
    raise AssertionError(name)


def test_names_are_made_whole():
    """What the other tests stand on."""
    found = imports('mmdenoiserep/core/files/fused.py')
    assert {'os', 'typing.Any', 'mmdenoiserep.core.fusing.fuse.FusionError'} <= set(found)
    assert layer('mmdenoiserep.core.files.fused') == (4, 'core.files')
    assert layer('mmdenoiserep.core.Moments') == (5, 'core') and layer('mmdenoiserep.Moments') == (10, 'mmdenoiserep')


@pytest.mark.parametrize('path', modules('mmdenoiserep/core'))
def test_the_core_needs_torch_and_in_one_place_greenlet(path):
    roots = {name.partition('.')[0] for name in imports(path)} - {'torch', 'mmdenoiserep'}
    assert roots - sys.stdlib_module_names == ({'greenlet'} if path == 'mmdenoiserep/core/utils/lockstep.py' else set())
    assert all(name.startswith('mmdenoiserep.core') for name in imports(path) if name.startswith('mmdenoiserep'))


@pytest.mark.parametrize('path', modules('mmdenoiserep'))
def test_inner_parts_know_nothing_of_outer_ones(path):
    name = path.removesuffix('.py').removesuffix('/__init__').replace('/', '.')
    here, part = layer(name)
    for other in imports(path):
        assert not other.startswith(('tools', 'studies', 'denoiserep_commands')), other
        if other.startswith('mmdenoiserep.'):
            there, its_part = layer(other)
            assert there < here or its_part == part, f'{part} imports {other}'


@pytest.mark.parametrize('path', modules('tools'))
def test_tools_know_the_package_alone(path):
    """And the launcher: no other tool, no study."""
    tools = {Path(tool).stem for tool in modules('tools')} - set(sys.stdlib_module_names)
    roots = {name.partition('.')[0] for name in imports(path)}
    assert not roots & ({'tools', 'studies', 'tests'} | tools)
    assert 'denoiserep_commands' in roots


@pytest.mark.parametrize('path', modules('mmdenoiserep'))
def test_the_package_leaves_the_command_line_to_the_tools(path):
    """It ends no program, and takes no parsed arguments."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Name | ast.Attribute):
            assert ast.unparse(node) not in ('SystemExit', 'sys.exit', 'os._exit', 'exit'), node.lineno
        if isinstance(node, ast.arg) and node.annotation:
            assert 'Namespace' not in ast.unparse(node.annotation), node.lineno
