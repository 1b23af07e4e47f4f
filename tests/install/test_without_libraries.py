"""What is left, and what is said, where a library is not installed: each in a Python that does not have it."""

import subprocess
import sys
from importlib.metadata import distributions, packages_distributions
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from helpers import ROOT
from tools_helpers import find_tool

CONFIGS = ROOT / 'configs'
PACKAGES = {
    'mmengine': 'mmengine',
    'mmcv': 'mmcv',
    'mmdet': 'mmdet',
    'mmseg': 'mmsegmentation',
    'mmpretrain': 'mmpretrain',
}
OF_LIBRARY = {
    'mmdet': 'demo/mask-rcnn_swin_scenes_denoiserep.py',
    'mmseg': 'demo/segformer_mit_scenes_denoiserep.py',
    'mmpretrain': 'demo/vit_fashion-mnist_denoiserep.py',
}
PLAIN = """
default_scope = '{library}'
model = dict(type='Model', backbone=dict(type='SwinTransformer'))
"""
MIXED = """
default_scope = 'mmengine'
custom_imports = dict(imports=['{library}'], allow_failed_imports=False)
"""

SCRIPT = """
import runpy, site, sys
site.addsitedir(sys.argv.pop(1))
sys.path.insert(0, sys.argv.pop(1))
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name='__main__') if sys.argv else exec(sys.stdin.read())
"""


@pytest.fixture(scope='session')
def run(tmp_path_factory):
    """Runs a tool, or without one some code, in a Python whose site-packages are links to all but some libraries."""
    sites = {}

    def make(libraries):
        folder = tmp_path_factory.mktemp('site')
        packages = {name for library in libraries for name in packages_distributions().get(library, [library])}
        hidden = set(libraries) | {name.replace('-', '_') for name in packages}  # as folders of metadata have them
        for source in (Path(path) for path in sys.path if path.endswith('site-packages')):
            for entry in source.iterdir():
                is_hidden = entry.name.partition('-')[0] in hidden
                is_another_site = entry.suffix == '.pth' and entry.name != 'torchvision_repair.pth'
                if not (is_hidden or is_another_site or (folder / entry.name).exists()):
                    (folder / entry.name).symlink_to(entry)
        return folder

    def run(libraries, *args, code=None, cwd='.'):
        libraries = tuple(libraries)
        sites[libraries] = sites.get(libraries) or make(libraries)
        tool = [find_tool(args[0]), *args[1:]] if args else []
        command = [sys.executable, '-S', '-W', 'ignore', '-c', SCRIPT, sites[libraries], ROOT, *tool]
        return subprocess.run(list(map(str, command)), cwd=cwd, input=code, capture_output=True, text=True, timeout=300)

    return run


def sentence(result):
    assert result.returncode == 1 and not result.stdout, result.stderr[-2000:]
    (line,) = result.stderr.splitlines()
    return line


@pytest.mark.parametrize('library', PACKAGES)
def test_the_library_is_hidden_and_the_others_are_there(library, run):
    code = f"""
from importlib.metadata import packages_distributions
from importlib.util import find_spec
names = {list(PACKAGES)}
print([name for name in names if not find_spec(name)], [name for name in names if name not in packages_distributions()])
"""
    result = run([library], code=code)
    assert result.stdout.split('\n')[0] == f"['{library}'] ['{library}']", result.stderr


def test_without_mmengine_the_package_is_its_core(run):
    code = """
import sys, torch
import mmdenoiserep
assert not hasattr(mmdenoiserep, 'DenoiseRepBackbone') and 'DenoiseRepBackbone' not in mmdenoiserep.__all__
assert all(hasattr(mmdenoiserep, name) for name in mmdenoiserep.__all__)
model = torch.nn.Sequential(torch.nn.Linear(4, 4))
mmdenoiserep.apply_denoiserep(model, 'all')
assert mmdenoiserep.verify_fusion(model, example_input=torch.randn(2, 4)).ok
print(sorted({name.partition('.')[0] for name in sys.modules if name.startswith('mm')} - {'mmap'}))
"""
    result = run(PACKAGES, code=code)
    assert result.stdout.strip() == "['mmdenoiserep']", result.stderr


def test_without_mmengine_a_checkpoint_can_be_fused(run, tmp_path):
    state = {'fc.weight': torch.eye(2), 'fc.denoiser.weight': torch.eye(2)[None] / 2}
    torch.save(dict(state_dict=state), tmp_path / 'in.pth')
    assert run(PACKAGES, 'fuse_checkpoint', 'in.pth', 'out.pth', cwd=tmp_path).returncode == 0
    assert torch.equal(torch.load(tmp_path / 'out.pth')['state_dict']['fc.weight'], torch.eye(2) / 2)
    result = run(
        PACKAGES, 'fuse_checkpoint', 'in.pth', 'no.pth', '--verify', CONFIGS / OF_LIBRARY['mmdet'], cwd=tmp_path
    )
    assert sentence(result).startswith('fuse_checkpoint: this tool needs mmengine, which is not installed; ')
    assert not (tmp_path / 'no.pth').exists()


def test_without_mmengine_images_are_corrupted(run, tmp_path):
    (tmp_path / 'in').mkdir()
    cv2.imwrite(str(tmp_path / 'in/a.png'), np.zeros((8, 8, 3), np.uint8))
    assert run(PACKAGES, 'corrupt_images', 'in', tmp_path / 'new/out', 'blur', cwd=tmp_path).returncode == 0
    assert (tmp_path / 'new/out/a.png').exists()


def test_without_mmengine_the_versions_are_printed(run):
    result = run(PACKAGES, code='import runpy; runpy.run_module("mmdenoiserep.info", run_name="__main__")')
    found = dict(line.split(': ', 1) for line in result.stdout.splitlines())
    assert found['torch'].startswith(torch.__version__) and found['mmdenoiserep'], result.stderr
    assert {found[name] for name in (*PACKAGES, 'mmcv.ops')} == {'not installed'}


FIGURES = ['c.py', 'in.pth', 'in.pth', '--out', 'out']


@pytest.mark.parametrize(
    ('library', 'tool', 'args'),
    [
        ('mmengine', 'train', ['c.py']),
        ('mmengine', 'test', ['c.py', 'in.pth']),
        ('mmengine', 'print_targets', ['c.py']),
        ('mmengine', 'calibrate', ['moments', 'c.py', 'in.pth', 'out.pth']),
        ('mmengine', 'export_onnx', ['c.py', 'in.pth', 'out.onnx']),
        ('mmengine', 'extract_features', ['c.py', 'in.pth', '.', 'out.npz']),
        ('mmengine', 'draw_matches', ['c.py', 'in.pth', 'out.png']),
        ('mmengine', 'convert_checkpoint', ['vmamba', 'in.pth', 'out.pth']),
        ('mmengine', 'visualize', FIGURES),
        ('sklearn', 'visualize', FIGURES),
        ('albumentations', 'corrupt_images', ['in', 'out', 'noise']),
        ('albumentations', 'visualize', FIGURES),
        ('onnxruntime', 'export_onnx', ['c.py', 'in.pth', 'out.onnx']),
        ('tqdm', 'calibrate', ['moments', 'c.py', 'in.pth', 'out.pth']),
    ],
)
def test_what_a_tool_needs_is_named(library, tool, args, run, tmp_path):
    (tmp_path / 'in').mkdir()
    cv2.imwrite(str(tmp_path / 'in/a.png'), np.zeros((8, 8, 3), np.uint8))
    (tmp_path / 'c.py').write_text('model = dict(backbone=dict())')
    torch.save({'weight': torch.ones(2)}, tmp_path / 'in.pth')
    line = sentence(run(PACKAGES if library == 'mmengine' else [library], tool, *args, cwd=tmp_path))
    package = dict(sklearn='scikit-learn').get(library, library)
    assert line.startswith(f'{tool}: this tool needs {library}, which is not installed; ')
    assert line.endswith(f': pip install {package}')
    assert {path.name for path in tmp_path.iterdir()} - {'__pycache__'} == {'c.py', 'in', 'in.pth'}


def read(run, library, *configs, cwd):
    """Returns what every tool says on reading some configs without a library, a line for each."""
    code = f"""
import sys
from denoiserep_commands import launch
from mmdenoiserep.apis.config import load_config
sys.argv = ['tool']
for config in {list(map(str, configs))}:
    try:
        launch(lambda: load_config(config))
        print('read')
    except SystemExit as stopped:
        print(str(stopped).replace('\\n', ' | '))
"""
    result = run([library], code=code, cwd=cwd)
    assert result.returncode == 0, result.stderr[-2000:]
    return result.stdout.splitlines()


@pytest.mark.parametrize('library', OF_LIBRARY)
def test_a_config_of_a_missing_library(library, run, tmp_path):
    (tmp_path / 'plain.py').write_text(PLAIN.format(library=library))
    (tmp_path / 'mixed.py').write_text(MIXED.format(library=library))
    plain, mixed, inherits = read(run, library, 'plain.py', 'mixed.py', CONFIGS / OF_LIBRARY[library], cwd=tmp_path)
    for line, name in ((plain, 'plain.py'), (mixed, 'mixed.py')):
        assert line.startswith(f'tool: the config {name} needs {library}, which is not installed; ')
        assert line.endswith(f': pip install {PACKAGES[library]}')
    assert f'{Path(OF_LIBRARY[library]).name} ' in inherits
    assert f'{PACKAGES[library]} is not installed' in inherits and '|' not in inherits


@pytest.mark.skipif(not any(distributions(name='mmdet')), reason='mmdet of the fork imports without mmcv')
def test_what_a_library_needs_in_turn(run, tmp_path):
    (tmp_path / 'plain.py').write_text(PLAIN.format(library='mmdet'))
    (tmp_path / 'typo.py').write_text(MIXED.format(library='mmdenoiserep.engin'))
    missing, typo = read(run, 'mmcv', 'plain.py', 'typo.py', cwd=tmp_path)
    assert ' the config plain.py needs mmcv, which is not installed; ' in missing
    assert 'mmdenoiserep.engin' in typo and 'not installed' not in typo


@pytest.mark.parametrize('library', OF_LIBRARY)
def test_the_configs_of_the_other_libraries_work(library, run):
    other = 'mmseg' if library == 'mmpretrain' else 'mmpretrain'
    result = run([library], 'print_targets', CONFIGS / OF_LIBRARY[other])
    assert result.returncode == 0 and 'layers denoised' in result.stdout, result.stderr[-2000:]
