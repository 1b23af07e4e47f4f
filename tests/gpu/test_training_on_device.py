"""Training on a device by mmengine's runner: joint and label-free, in mixed precision, and in two processes."""

import os
from pathlib import Path

import pytest
import torch
from mmengine.device import get_device

from engine_helpers import denoised, gradients, inner, runner_case, snapshot, split, tiny_model, train
from helpers import copied
from mmdenoiserep.core import read_checkpoint

pytestmark = pytest.mark.gpu

JOINT = dict(type='DenoiseLossHook', mode='joint', weight=0.1, tokens=None)
LABEL_FREE = dict(type='DenoiseLossHook', mode='label_free', tokens=None)
FLOAT16 = dict(type='AmpOptimWrapper', loss_scale=dict(init_scale=2.0**10), dtype='float16')
BFLOAT16 = dict(type='AmpOptimWrapper', dtype='bfloat16')
SWIN = dict(arch=dict(embed_dims=12, depths=[2, 2], num_heads=[1, 2]), img_size=32, window_size=4, out_indices=(0, 1))


@pytest.fixture(autouse=True)
def only_where_the_runner_goes(device):
    """mmengine's runner takes the GPU if there is one."""
    if device.type != get_device():
        pytest.skip(f'mmengine trains on {get_device()} here')


def amp(optim, device):
    """Returns an optimizer wrapper in mixed precision; mmengine has none for the CPU."""
    if device.type == 'cpu':
        return (
            dict(type='AutocastWrapper') if optim is BFLOAT16 else pytest.skip('loss scaling needs a GPU in mmengine')
        )
    return optim


@pytest.mark.parametrize('optim', [FLOAT16, BFLOAT16], ids=['float16', 'bfloat16'])
@pytest.mark.parametrize('hook', [JOINT, LABEL_FREE], ids=['joint', 'label-free'])
def test_mixed_precision_trains_as_float32_does(hook, optim, device):
    """The weights after three steps differ by rounding only, and far less than the steps changed them."""
    states = []
    for wrapper in (dict(type='RecordingWrapper'), amp(optim, device)):
        with runner_case() as case:
            before = snapshot(inner(train(case, tiny_model(), [hook], iterations=0)))
        with runner_case() as case:
            runner = train(case, tiny_model(), [hook], iterations=3, optim=wrapper)
            assert next(inner(runner).parameters()).device.type == device.type
            states.append(snapshot(inner(runner)))
    exact, half = states
    for own, base in ((0, 1), (1, 0)):  # denoisers, then everything else
        parts = [split(state)[own] for state in (before, exact, half)]
        start, end, other = (torch.cat([v.float().flatten() for v in part.values()]) for part in parts)
        moved = (end - start).norm()
        assert (moved > 0) == (own == 0 or hook is JOINT), base
        assert (other - end).norm() <= 0.2 * moved


def test_a_fused_file_of_a_training_on_the_device(case, device):
    hooks = [JOINT, dict(type='DenoiseFusionHook')]
    keep = dict(checkpoint=dict(type='CheckpointHook', interval=2, by_epoch=False))
    runner = train(case, tiny_model(), hooks, iterations=2, default_hooks=keep)
    state = read_checkpoint(Path(runner.work_dir, 'iter_2_fused.pth'))['state_dict']
    assert {value.device.type for value in state.values()} == {'cpu'}
    plain = tiny_model(dict(type='TinyBackbone'))
    model = type(inner(runner))(**{key: value for key, value in plain.items() if key != 'type'}).to(device)
    model.load_state_dict(state)
    images = torch.randn(2, 3, 9, 9, device=device)
    live = inner(runner).eval()
    with torch.no_grad():
        expected, actual = live(images), model.eval()(images)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_gradient_checkpointing_changes_no_gradient(device):
    """Of a Swin of mmpretrain, whose blocks run again in the backward pass."""
    pytest.importorskip('mmpretrain.models')
    found = []
    for with_cp in (False, True):
        swin = dict(type='mmpretrain.SwinTransformer', **SWIN, with_cp=with_cp)
        model = dict(type='FeatureModel', backbone=denoised(swin, image_size=32))
        with runner_case() as case:
            runner = train(case, model, [JOINT], size=32)
            found.append(copied(gradients(runner)))
    assert split(found[0])[0].keys() == split(found[1])[0].keys() != set()
    for key, value in found[0].items():
        torch.testing.assert_close(found[1][key], value, rtol=1e-3, atol=1e-6)


def backends(device):
    """Two processes share one GPU by gloo; NCCL refuses that, and gets a GPU for each."""
    return ['gloo', 'nccl'] if device.type == 'cuda' and torch.cuda.device_count() > 1 else ['gloo']


def worker(rank, backend, folder):
    """One of two processes: trains jointly on its half of each batch; writes its weights."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank if backend == 'nccl' else 0), WORLD_SIZE='2')
    if backend == 'nccl':
        torch.cuda.set_device(rank)
    torch.distributed.init_process_group(backend, init_method=f'file://{folder}/meet', rank=rank, world_size=2)
    torch.save(joint_state(2, folder), Path(folder, f'rank{rank}.pth'))


def joint_state(world, folder):
    """Returns the weights after two joint steps on global batches of four."""
    plain = tiny_model(norm=False)
    plain['backbone']['backbone'] = dict(type='TinyBackbone', norm=False)
    with runner_case() as case:
        loader = dict(case.iter_based_cfg.train_dataloader.to_dict(), batch_size=4 // world)
        loader |= dict(dataset=dict(type='TinyDataset'), sampler=dict(type='InfiniteSampler', shuffle=False))
        changes = dict(work_dir=str(folder), train_dataloader=loader, train_cfg=dict(by_epoch=False, max_iters=2))
        if world > 1:
            wrapper = dict(type='MMDistributedDataParallel', device_ids=None)
            changes.update(launcher='pytorch', model_wrapper_cfg=wrapper)
        return {key: value.cpu() for key, value in snapshot(inner(train(case, plain, [JOINT], **changes))).items()}


def test_two_processes_train_as_one(device, tmp_path):
    alone = joint_state(1, tmp_path / 'alone')
    for backend in backends(device):
        folder = tmp_path / backend
        folder.mkdir()
        torch.multiprocessing.spawn(worker, (backend, folder), nprocs=2)
        first, second = (torch.load(folder / f'rank{rank}.pth', weights_only=True) for rank in range(2))
        for key, value in alone.items():
            assert torch.equal(first[key], second[key]), (backend, key)
            torch.testing.assert_close(first[key], value, rtol=1e-4, atol=1e-5)
