"""The sdist, the wheel, what they promise to OpenMMLab's programs, and the wheel in a user's environment."""

import os
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from email.parser import BytesParser
from pathlib import Path

import pytest
import torch
import yaml
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from modelindex.load_model_index import load

import mmdenoiserep
from helpers import ROOT
from tiny_datasets import write_fashion_mnist
from tools_helpers import find_tool

MIM = 'mmdenoiserep/.mim/'
MEASURED = {
    'vit_fashion-mnist': 'ViT',
    'swin_fashion-mnist': 'Swin',
    'resnet_fashion-mnist': 'ResNet',
    'vmamba_fashion-mnist': 'VMamba',
    'segformer_mit_scenes': 'SegFormer MiT',
    'mask-rcnn_swin_scenes': 'Mask R-CNN Swin',
    'vit_fashion-reid': 'ViT, re-identification',
}
"""The configs that were studied, by the names that docs/ has for them."""


def source(*folders):
    """Returns all files of the checkout in some folders, relative to it."""
    files = (path for folder in folders for path in (ROOT / folder).rglob('*') if path.is_file())
    return {path.relative_to(ROOT).as_posix() for path in files if '__pycache__' not in path.parts}


def run(*command, cwd):
    env = {key: value for key, value in os.environ.items() if key != 'PYTHONPATH'} | {'OMP_NUM_THREADS': '1'}
    result = subprocess.run([*map(str, command)], cwd=cwd, env=env, capture_output=True, text=True, timeout=600)
    output = result.stdout + result.stderr
    assert result.returncode == 0, output[-4000:]
    return output


def environment(folder, *package):
    """Makes a virtual environment on top of the running one, installs a package there, returns its programs' folder."""
    venv.create(folder, symlinks=True)
    (site,) = folder.glob('lib/python*/site-packages')
    below = [f'import site; site.addsitedir({path!r})\n' for path in sys.path if path.endswith('-packages')]
    (site / 'below.pth').write_text(''.join(below))
    pip = [sys.executable, '-m', 'pip', '--python', folder / 'bin/python', '--no-cache-dir', 'install']
    run(*pip, '--no-index', '--no-deps', '--no-build-isolation', *package, cwd=folder)
    return folder / 'bin'


@pytest.fixture(scope='session')
def programs(wheel, tmp_path_factory):
    return environment(tmp_path_factory.mktemp('user') / 'venv', wheel)


def test_the_sdist_holds_the_checkout(sdist):
    with tarfile.open(sdist) as file:
        names = {name.partition('/')[2] for name in file.getnames()}
    wanted = source('mmdenoiserep', 'configs', 'tools', 'studies', 'tests', 'docs', 'demo', 'docker', 'requirements')
    wanted |= {path.name for path in ROOT.iterdir() if path.is_file() and not path.name.startswith('.')}
    assert wanted <= names and len(wanted) > 300
    assert not any(name.endswith('.pyc') or MIM in name for name in names)
    left = {path.relative_to(sdist.parent / 'source').as_posix() for path in (sdist.parent / 'source').rglob('*')}
    assert not any('.mim' in name for name in left)


def test_the_wheel_holds_what_is_used(wheel):
    with zipfile.ZipFile(wheel) as file:
        names = {name for name in file.namelist() if not name.endswith('/')}
        (metadata,) = (name for name in names if name.endswith('.dist-info/METADATA'))
        fields = BytesParser().parsebytes(file.read(metadata))
        info = metadata.removesuffix('METADATA')
        licence = file.read(f'{info}licenses/LICENSE')
    shipped = {MIM + name for name in source('configs', 'tools') | {'model-index.yml'}}
    assert {name for name in names if not name.startswith(info)} == (
        source('mmdenoiserep') | shipped | {'denoiserep_commands.py'}
    )
    assert {f'{MIM}configs/coco/mask-rcnn_r50_fpn_1x_coco_denoiserep.py', f'{MIM}tools/train.py'} <= shipped
    assert licence == (ROOT / 'LICENSE').read_bytes()
    assert fields['Name'] == 'mmdenoiserep' and fields['License-Expression'] == 'Apache-2.0'
    assert fields['Requires-Python'] == '>=3.10'
    required = fields.get_all('Requires-Dist')
    assert [name for name in required if 'extra' not in name] == ['torch>=2.6', 'greenlet>=3'], 'what the core needs'
    extra = {re.split('[<>;]', name)[0] for name in required if 'extra == "mm"' in name}
    assert extra == {'mmengine', 'mmcv', 'numpy', 'setuptools', 'torch', 'tqdm'}
    page = (ROOT / 'docs/get-started.md').read_text()
    assert all(f'| `{extra}` |' in page for extra in fields.get_all('Provides-Extra')), 'the page has them all'


def test_one_version(wheel):
    version = mmdenoiserep.__version__
    assert wheel.name.startswith(f'mmdenoiserep-{version}-')
    assert re.search(r'^## \[(.+?)\]', (ROOT / 'CHANGELOG.md').read_text(), re.MULTILINE)[1] == version
    citation = yaml.safe_load((ROOT / 'CITATION.cff').read_text())
    assert citation['version'] == version and citation['license'] == 'Apache-2.0'


def test_the_commands_are_the_tools(programs, tmp_path):
    names = {path.name for path in programs.glob('denoiserep-*')}
    listed = re.search(r'are commands then: (.*?);', (ROOT / 'docs/get-started.md').read_text())[1]
    assert names == {f'denoiserep-{name}' for name in re.findall(r'`(?:denoiserep)?-([a-z-]+)`', listed)}
    for name in names:
        tool = find_tool(name.removeprefix('denoiserep-').replace('-', '_'))
        description = tool.read_text().split('"""')[1].split('\n')[0]
        printed = run(programs / name, '--help', cwd=tmp_path)
        assert printed.startswith(f'usage: {name} ') and description in ' '.join(printed.split())


def test_commands_of_an_editable_package(sdist, tmp_path):
    checkout = sdist.parent / 'source'
    programs = environment(tmp_path / 'venv', '--editable', checkout)
    assert 'Evaluates a checkpoint' in run(programs / 'denoiserep-test', '--help', cwd=tmp_path)
    found = run(programs / 'python', '-c', 'import denoiserep_commands as c; print(c.TOOLS)', cwd=tmp_path)
    assert Path(found.strip()) == checkout / 'tools'
    assert not (checkout / MIM).exists()


def test_a_users_config_inherits_from_the_installed_package(programs, tmp_path):
    where = 'from importlib.util import find_spec; print(find_spec("mmdenoiserep").origin)'
    package = Path(run(programs / 'python', '-c', where, cwd=tmp_path).strip()).parent
    assert package.is_relative_to(programs.parent)
    write_fashion_mnist(tmp_path / 'work_dirs/fashion-mnist')
    (tmp_path / 'my_config.py').write_text("_base_ = 'mmdenoiserep::demo/vit_fashion-mnist.py'\n")
    recipe = re.search(r'```python\n(_base_ = .*?)```', (ROOT / 'README.md').read_text(), re.DOTALL)[1]
    assert "'all'" in recipe
    (tmp_path / 'mine.py').write_text(recipe.replace("'all'", "'mlp'"))
    table = run(programs / 'denoiserep-print-targets', 'mine.py', cwd=tmp_path)
    assert '8 layers denoised' in table and 'layers.3.ffn.layers.1 ' in table
    run(programs / 'denoiserep-train', 'my_config.py', '--cfg-options', 'train_cfg.max_iters=1', cwd=tmp_path)
    (tmp_path / 'work_dirs/my_config/iter_1.pth').rename(tmp_path / 'my_trained_checkpoint.pth')

    short = ['train_cfg.max_iters=2', 'default_hooks.logger.interval=1', 'optim_wrapper.optimizer.lr=10']
    log = run(programs / 'denoiserep-train', 'mine.py', '--cfg-options', *short, cwd=tmp_path)
    assert 'loss_denoise: ' in log and 'accuracy/top1: ' in log
    trained = tmp_path / 'work_dirs/mine/iter_2.pth'
    run(programs / 'denoiserep-fuse-checkpoint', trained, 'fused.pth', cwd=tmp_path)
    by_hook = torch.load(trained.with_name('iter_2_fused.pth'), weights_only=True)['state_dict']

    init_default_scope('mmpretrain')
    vanilla = MODELS.build(Config.fromfile(package / '.mim/configs/demo/vit_fashion-mnist.py').model)
    fused = torch.load(tmp_path / 'fused.pth', weights_only=True)['state_dict']
    vanilla.load_state_dict(fused, strict=True)
    assert all(torch.equal(value, by_hook[key]) for key, value in fused.items()), 'tool and hook agree'
    unfused = torch.load(trained, weights_only=False)['state_dict']
    changed = {key for key, value in fused.items() if not torch.equal(value, unfused[key])}
    assert changed and all(re.search(r'\.ffn\.layers\.', key) for key in changed)


def numbers(model):
    return {(result.dataset, name): value for result in model.results for name, value in result.metrics.items()}


def rows(text):
    return [[cell.strip() for cell in line.strip('|').split('|')] for line in text.splitlines() if line[:2] == '| ']


@pytest.fixture(scope='session')
def index():
    """The model index as its own package reads it: the models by name, in the two collections."""
    index = load(str(ROOT / 'model-index.yml'))
    assert index.check(silent=True) == []
    paper, ours = (collection.name for collection in index.collections)
    models = list(index.models)
    assert len(models) == len({model.name for model in models}) == 20
    assert all((ROOT / model.config).is_file() and Path(model.config).stem == model.name for model in models)
    assert {model.in_collection for model in models} == {paper, ours}
    return [{m.name: m for m in models if m.in_collection == collection} for collection in (paper, ours)]


def test_the_papers_numbers_are_labelled(index):
    """They are those of configs/README.md, and stand on no config with numbers of ours."""
    paper, ours = index
    table = [row for row in rows((ROOT / 'configs/README.md').read_text()) if re.fullmatch(r'[\d.]+, [\d.]+', row[-1])]
    listed = {row[0].split('`')[1].split('/')[1] + '_denoiserep': row[-1].split(', ') for row in table}
    assert len(listed) == 6
    assert {name: [str(value) for value in sorted(numbers(model).values())] for name, model in paper.items()} == listed
    for models, labelled in ((paper, True), (ours, False)):
        metrics = [metric for model in models.values() for _, metric in numbers(model)]
        assert all(metric.endswith(", the paper's") == labelled for metric in metrics)


def test_our_numbers_are_those_of_the_studies(index):
    """Every figure of ours stands in docs/, in the row and column that it names; none is left out."""
    _, ours = index
    text = {name: (ROOT / f'docs/{name}.md').read_text() for name in ('study', 'domain')}
    studied = [row for row in rows(text['study']) if len(row) == 9]
    sections = dict(section.split('\n', 1) for section in text['domain'].split('\n### ')[1:])
    expected = {}
    for config, label in MEASURED.items():
        for _, metric, baseline, control, fused, *_ in (row for row in studied if row[0] == label):
            for stage, cell in dict(baseline=baseline, control=control, fused=fused).items():
                expected[f'{config}_denoiserep', None, f'{metric}, {stage}'] = cell
        table = rows(sections[label])
        for i, header in enumerate(table):
            if header[0].endswith(', %'):
                metric = header[0].removesuffix(', %')
                trained = next(row for row in table[i:] if row[0] == 'as trained')
                gain = next(row for row in table[i:] if row[0] == 'what the check writes')
                for column, before, added in zip(header[1:], trained[1:], gain[1:], strict=True):
                    expected[config, column, f'{metric}, as trained'] = before
                    expected[config, column, f'gain in {metric} by the fit'] = added
    found = {}
    for name, model in ours.items():
        for (dataset, metric), value in numbers(model).items():
            column = None if name.endswith('_denoiserep') else dataset.split(', ')[1]
            found[name, column, metric] = value
    assert found == {key: float(cell.split(' ± ')[0]) for key, cell in expected.items()}
    assert len(found) > 100


def test_the_hooks_of_a_commit_check(tmp_path):
    (repo,) = yaml.safe_load((ROOT / '.pre-commit-config.yaml').read_text())['repos']
    (tmp_path / 'unclean.py').write_text('import os\nx = "a"\n')
    for hook in repo['hooks']:
        command = [sys.executable, *hook['entry'].split()[1:]]
        run(*command, ROOT / 'tools/train.py', cwd=ROOT)
        assert subprocess.run([*command, tmp_path / 'unclean.py'], cwd=ROOT, capture_output=True).returncode == 1
