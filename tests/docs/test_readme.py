"""Runs every command of the README, on data in COCO's own layout; ``make demo`` and ``make test`` are run by CI."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import cv2
import pytest
from mmdet.datasets import CocoDataset

from helpers import ROOT

CLASSES = CocoDataset.METAINFO['classes']
README = (ROOT / 'README.md').read_text(encoding='utf-8')
COMMANDS = [line for block in re.findall(r'```bash\n(.*?)```', README, re.DOTALL) for line in block.splitlines()]
SMALL = ['train_dataloader.dataset.pipeline.2.scale=(160,96)', 'load_from=None', 'train_dataloader.num_workers=0']
SMALL += [f'{split}_dataloader.{key}' for split in ('train', 'val', 'test') for key in ('persistent_workers=False',)]
SMALL += ['val_dataloader.num_workers=0', 'test_dataloader.num_workers=0']
SMALL += [f'{split}_dataloader.dataset.pipeline.1.scale=(160,96)' for split in ('val', 'test')]
EXTRA = {
    'print_targets': [],
    'train': ['--cfg-options', *SMALL, 'default_hooks.checkpoint.interval=12', 'train_cfg.val_interval=12'],
    'fuse_checkpoint': [],
    'test': ['--cfg-options', *SMALL],
    'calibrate': ['--num-images', '8', '--cfg-options', *SMALL],
}
"""What is appended to make full-size commands small: small pictures, no download of weights, no worker processes."""


@pytest.fixture
def clone(tmp_path):
    """A folder that looks like a clone, with COCO in ``data/coco``: two training images and one validation image."""
    for name in ('configs', 'tools', 'studies', 'demo'):
        (tmp_path / name).symlink_to(ROOT / name)
    make = [sys.executable, '-m', 'studies.make_scenes', 'scenes', '--train', '2', '--val', '1']
    subprocess.run(make, cwd=tmp_path, check=True, capture_output=True)
    coco = tmp_path / 'data/coco'
    (coco / 'annotations').mkdir(parents=True)
    for split, name in (('training', 'train2017'), ('validation', 'val2017')):
        shutil.copytree(tmp_path / 'scenes/images' / split, coco / name)
        annotations = json.loads((tmp_path / f'scenes/annotations/instances_{split}.json').read_text())
        annotations['categories'] = [dict(id=i, name=name) for i, name in enumerate(CLASSES, 1)]
        (coco / f'annotations/instances_{name}.json').write_text(json.dumps(annotations))
    (tmp_path / 'my_images').mkdir()
    for number in range(8):  # dark ones, for which there is something to correct
        paths = sorted(coco.glob('*2017/*'))
        cv2.imwrite(str(tmp_path / f'my_images/{number}.png'), cv2.imread(str(paths[number % len(paths)])) // 4)
    return tmp_path


def test_the_readme_names_no_other_commands():
    tools = [re.match(r'python tools/(\w+)\.py ', line) for line in COMMANDS]
    assert {m[1] for m in tools if m} == set(EXTRA)
    assert {line for line, match in zip(COMMANDS, tools, strict=True) if not match} == {'make demo', 'make test'}


def test_the_commands_of_the_readme(clone):
    for line in COMMANDS:
        if line.startswith('make '):
            continue
        _, script, *args = shlex.split(line)
        more = ['--accept', 'all'] if args[0] == 'domain' else []  # one image decides by chance
        command = [sys.executable, '-W', 'ignore', script, *args, *more, *EXTRA[Path(script).stem]]
        result = subprocess.run(command, cwd=clone, text=True, capture_output=True, timeout=600)
        assert result.returncode == 0, f'{line}\n{result.stdout[-2000:]}{result.stderr[-4000:]}'
    assert (clone / 'fused.pth').is_file() and (clone / 'fitted.pth').is_file()
