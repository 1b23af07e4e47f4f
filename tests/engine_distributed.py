"""Two gloo processes that train tiny models; started by the tests, imported afresh by each process."""

import os
from pathlib import Path

import torch
import torch.distributed as dist

from engine_helpers import gradients, inner, runner_case, snapshot, tiny_model, train
from mmdenoiserep.engine import fusion_hook

WORLD = 2
WRAPPER = dict(type='MMDistributedDataParallel', device_ids=None)


def scenarios() -> dict[str, dict]:
    """Arguments of train() for every run that is made with one and with two processes; BatchNorm only where fixed."""
    plain = tiny_model(norm=False)
    plain['backbone']['backbone'] = dict(type='TinyBackbone', norm=False)
    joint = dict(type='DenoiseLossHook', mode='joint', weight=0.1, tokens=None)
    label_free = dict(type='DenoiseLossHook', mode='label_free', tokens=None)
    return {
        'joint': dict(model=plain, hooks=[joint], unused=False),
        'label_free': dict(model=tiny_model(), hooks=[label_free], unused=True),
        'label_free_synced': dict(
            model=tiny_model(),
            hooks=[label_free, dict(type='SyncBuffersHook'), dict(type='DenoiseFusionHook')],
            unused=True,
        ),
        'joint_synced': dict(
            model=tiny_model(), hooks=[dict(type='DenoiseLossHook'), dict(type='SyncBuffersHook')], unused=False
        ),
        'refused': dict(model=tiny_model(), hooks=[label_free], unused=False),
    }


def run_scenario(scenario: dict, world: int, work_dir: str) -> dict:
    """Runs two iterations on a global batch of four; returns what the tests compare, or the error's text."""
    scenario = dict(scenario)
    unused = scenario.pop('unused')
    with runner_case() as case:
        config = case.iter_based_cfg
        loader = dict(config.train_dataloader.to_dict(), batch_size=4 // world)
        loader['dataset'] = dict(type='TinyDataset')
        loader['sampler'] = dict(type='InfiniteSampler', shuffle=False)
        changes = dict(
            work_dir=work_dir,
            train_dataloader=loader,
            train_cfg=dict(by_epoch=False, max_iters=2),
            default_hooks=dict(checkpoint=dict(type='CheckpointHook', interval=1, by_epoch=False)),
        )
        if world > 1:
            changes.update(launcher='pytorch', model_wrapper_cfg=dict(WRAPPER, find_unused_parameters=unused))
        try:
            runner = train(case, **scenario, **changes)
        except ValueError as error:
            return dict(error=str(error))
        scalars = runner.message_hub.log_scalars
        return dict(
            gradients=[gradients(runner, step) for step in range(len(runner.optim_wrapper.gradients))],
            state=snapshot(inner(runner)),
            loss=float(scalars['train/loss_denoise'].current()),
        )


def worker(rank: int, folder: str) -> None:
    """One of the two processes; writes rank<N>.pth with the results of all scenarios."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(WORLD))
    written = []
    fuse = fusion_hook.fuse_checkpoint

    def recording(source, target, **options):
        written.append(target.name)
        return fuse(source, target, **options)

    fusion_hook.fuse_checkpoint = recording
    results = {}
    for name, scenario in scenarios().items():
        # a file is where the processes meet, so no port has to be free; RunnerTestCase ends the group
        dist.init_process_group('gloo', init_method=f'file://{folder}/meet_{name}', rank=rank, world_size=WORLD)
        results[name] = run_scenario(scenario, WORLD, str(Path(folder, name)))
        results[name]['written'] = list(written)
        written.clear()
    torch.save(results, Path(folder, f'rank{rank}.pth'))
