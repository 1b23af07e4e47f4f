"""The launch scripts: what they accept and hand to torchrun and srun; two processes, of which one is killed."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmengine.registry import MODELS

from engine_helpers import TinyDataset, assert_equal, is_denoiser, split, tiny_model
from helpers import ROOT

TOOLS = ROOT / 'tools'
USAGE = {
    'dist_train': 'CONFIG GPUS [arguments of train.py]',
    'dist_test': 'CONFIG CHECKPOINT GPUS [arguments of test.py]',
    'slurm_train': 'PARTITION JOB_NAME CONFIG WORK_DIR [arguments of train.py]',
    'slurm_test': 'PARTITION JOB_NAME CONFIG CHECKPOINT [arguments of test.py]',
}
SHOW = '#!/bin/bash\nprintf "%s\\n" "$(basename "$0")" "$@" "MASTER_PORT is ${MASTER_PORT:-not set}"\n'
PAGE = (ROOT / 'docs/distributed.md').read_text(encoding='utf-8')
COMMANDS = re.findall(r'^.*bash tools/\w+\.sh .*$', PAGE, re.MULTILINE)
CONFIG = """
custom_imports = dict(imports=['mmdenoiserep', 'launched'], allow_failed_imports=False)
backbone = dict(type='DenoiseRepBackbone', backbone=dict(type='TinyBackbone'), image_size=9)
model = dict(type='TinyModel', backbone=backbone)
data = dict(batch_size=2, num_workers=0, dataset=dict(type='TinyDataset'))
train_dataloader = dict(data, sampler=dict(type='DefaultSampler', shuffle=True))
test_dataloader = dict(data, sampler=dict(type='DefaultSampler', shuffle=False))
test_evaluator = dict(type='MeanOutput')
train_cfg = dict(by_epoch=True, max_epochs=3)
test_cfg = dict()
optim_wrapper = dict(optimizer=dict(type='AdamW', lr=0.01), clip_grad=dict(max_norm=1.0))
param_scheduler = dict(type='CosineAnnealingLR', by_epoch=False, T_max=12)
default_hooks = dict(checkpoint=dict(type='CheckpointHook', interval=1), logger=dict(type='LoggerHook', interval=1))
custom_hooks = [dict(type='DenoiseLossHook'), dict(type='DenoiseFusionHook')]
randomness = dict(seed=3)
"""
"""Sixteen images, so four iterations an epoch for two processes of two images each."""


def script(name, *args, cwd, code=0, **variables):
    """Runs a launch script with some variables in its environment and returns what it printed on both streams."""
    env = {key: value for key, value in os.environ.items() if key not in ('PORT', 'MASTER_PORT', 'GPUS')} | variables
    command = ['bash', TOOLS / f'{name}.sh', *map(str, args)]
    result = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=600)
    assert result.returncode == code, (result.stdout + result.stderr)[-6000:]
    return result.stdout, result.stderr


@pytest.fixture
def stubs(tmp_path):
    """A PATH on which python and srun only print their names and arguments, one a line, and the port."""
    for name in ('python', 'srun'):
        (tmp_path / 'stubs').mkdir(exist_ok=True)
        (tmp_path / 'stubs' / name).write_text(SHOW)
        (tmp_path / 'stubs' / name).chmod(0o755)
    return f'{tmp_path / "stubs"}:/usr/bin:/bin'


@pytest.mark.parametrize('name', USAGE)
def test_wrong_arguments(name, stubs, tmp_path):
    needed = USAGE[name].split(' [')[0].split()
    wrong = [needed[:-1]] + ([[*needed[:-1], count] for count in ('0', 'two')] if needed[-1] == 'GPUS' else [])
    for args in wrong:
        out, error = script(name, *args, cwd=tmp_path, code=2, PATH=stubs)
        assert (out, error) == ('', f'usage: {TOOLS / name}.sh {USAGE[name]}\n')


@pytest.mark.parametrize(
    ('name', 'files'), [('dist_train', ['my config.py']), ('dist_test', ['my config.py', 'a.pth'])]
)
def test_what_torchrun_gets(name, files, stubs, tmp_path):
    program = str(TOOLS / f'{name.removeprefix("dist_")}.py')
    rest = [program, *files, '--launcher=pytorch', '--cfg-options', 'a="b c"', 'MASTER_PORT is not set']
    several = dict(NNODES='2', NODE_RANK='1', MASTER_ADDR='10.0.0.7', PORT='1234')
    one = ['--nnodes=1', '--node-rank=0', '--nproc-per-node=4', '--master-addr=127.0.0.1', '--master-port=29500']
    two = ['--nnodes=2', '--node-rank=1', '--nproc-per-node=4', '--master-addr=10.0.0.7', '--master-port=1234']
    for variables, expected in (({}, one), (several, two)):
        out, _ = script(name, *files, 4, '--cfg-options', 'a="b c"', cwd=tmp_path, PATH=stubs, **variables)
        assert out.splitlines() == ['python', '-m', 'torch.distributed.run', *expected, *rest]


@pytest.mark.parametrize('name', ['slurm_train', 'slurm_test'])
def test_what_srun_gets(name, stubs, tmp_path):
    program = ['python', '-u', str(TOOLS / f'{name.removeprefix("slurm_")}.py'), 'c.py']
    program += ['--work-dir=runs/a b'] if name == 'slurm_train' else ['runs/a b']
    program += ['--launcher=slurm', '--cfg-options', 'x=1']

    def srun(**variables):
        args = ['gpu', 'my job', 'c.py', 'runs/a b', '--cfg-options', 'x=1']
        *lines, port = script(name, *args, cwd=tmp_path, PATH=stubs, **variables)[0].splitlines()
        assert lines[:3] == ['srun', '--partition=gpu', '--job-name=my job']
        assert lines[-len(program) :] == program
        return [*lines[3 : -len(program)], port]

    def expected(gpus, per_node, cpus=5, more=(), port='not set'):
        tasks = [f'--gres=gpu:{per_node}', f'--ntasks={gpus}', f'--ntasks-per-node={per_node}']
        return [*tasks, f'--cpus-per-task={cpus}', '--kill-on-bad-exit=1', *more, f'MASTER_PORT is {port}']

    assert srun() == expected(8, 8)
    assert srun(GPUS='2') == expected(2, 2)
    assert srun(GPUS='16') == expected(16, 8)
    every = dict(GPUS='8', GPUS_PER_NODE='4', CPUS_PER_TASK='3', SRUN_ARGS='--time=1:00 --exclusive', PORT='1234')
    assert srun(**every) == expected(8, 4, 3, ['--time=1:00', '--exclusive'], 1234)
    assert srun(MASTER_PORT='4321') == expected(8, 8, port=4321)


@pytest.mark.parametrize('line', COMMANDS)
def test_the_commands_of_the_page(line, stubs):
    result = subprocess.run(['bash', '-c', line], cwd=ROOT, env={'PATH': stubs}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    words = [word for word in result.stdout.splitlines() if word.endswith('.py')]
    assert len(words) == 2 and all((ROOT / word).is_file() for word in words)
    assert any(word in result.stdout.split() for word in ('--launcher=pytorch', '--launcher=slurm'))
    assert {re.search(r'tools/(\w+)\.sh', each)[1] for each in COMMANDS} == set(USAGE), 'the page has all scripts'


def launch(name, *args, cwd, code=0):
    """Runs a script on two processes of this Python, on the CPU; returns its standard error, with the logs."""
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = str(free.getsockname()[1])
    path = f'{Path(sys.executable).parent}:{os.environ["PATH"]}'
    modules = os.pathsep.join([str(ROOT), str(ROOT / 'tests')])
    variables = dict(PATH=path, PYTHONPATH=modules, PORT=port, OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='')
    return ''.join(script(name, *args, cwd=cwd, code=code, **variables))


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    """Two processes that train to the end, two of which one is killed in its second epoch, and their resumed run."""
    root = tmp_path_factory.mktemp('launched')
    (root / 'run.py').write_text(CONFIG)
    killer = "custom_hooks = [*_base_.custom_hooks, dict(type='KillSecondProcess', iterations=6)]"
    (root / 'killed.py').write_text(f"_base_ = './run.py'\n{killer}\n")
    launch('dist_train', 'run.py', 2, '--work-dir', 'whole', cwd=root)
    killed = launch('dist_train', 'killed.py', 2, '--work-dir', 'resumed', cwd=root, code=1)
    left = {path.name for path in (root / 'resumed').glob('*.pth')}
    first = (root / 'resumed/epoch_1.pth').read_bytes()
    resumed = launch('dist_train', 'run.py', 2, '--work-dir', 'resumed', '--resume', cwd=root)
    assert (root / 'resumed/epoch_1.pth').read_bytes() == first, 'the first epoch is not trained again'
    return root, killed, left, resumed


def test_a_killed_process_ends_the_run(runs):
    root, killed, left, _ = runs
    assert 'SIGKILL' in killed
    assert left == {'epoch_1.pth', 'epoch_1_fused.pth'}
    assert torch.load(root / 'resumed/epoch_1.pth', weights_only=False)['meta']['iter'] == 4


def test_a_resumed_run_ends_as_one_that_was_not_killed(runs):
    root, _, _, resumed = runs
    assert 'resumed epoch: 1, iter: 4' in resumed
    ours, whole = (torch.load(root / run / 'epoch_3.pth', weights_only=False) for run in ('resumed', 'whole'))
    assert_equal(ours['state_dict'], whole['state_dict'])
    assert any(value.any() for value in split(whole['state_dict'])[0].values()), 'the denoisers were trained'
    for key, state in whole['optimizer']['state'].items():
        assert_equal(ours['optimizer']['state'][key], state)
    first = torch.load(root / 'resumed/epoch_1.pth', weights_only=False)['state_dict']
    assert not any(torch.equal(first[key], whole['state_dict'][key]) for key in first if is_denoiser(key))
    ours, whole = (torch.load(root / run / 'epoch_3_fused.pth', weights_only=True) for run in ('resumed', 'whole'))
    assert_equal(ours['state_dict'], whole['state_dict'])


def test_two_processes_evaluate_every_image_once(runs):
    root = runs[0]
    launch('dist_test', 'run.py', 'whole/epoch_3.pth', 2, '--work-dir', 'tested', cwd=root)
    (log,) = (root / 'tested').glob('*/*.json')
    model = MODELS.build(tiny_model()).eval()
    model.load_state_dict(torch.load(root / 'whole/epoch_3.pth', weights_only=False)['state_dict'])
    with torch.no_grad():
        mean = model(TinyDataset().images).mean().item()
    result = json.loads(log.read_text())
    assert result['images'] == 16 and result['mean'] == pytest.approx(mean, rel=1e-5)
