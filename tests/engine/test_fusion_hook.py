"""DenoiseFusionHook: fused copies beside exactly the checkpoints that a run keeps."""

from pathlib import Path

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from engine_helpers import (
    assert_equal,
    average_of,
    files,
    inner,
    is_denoiser,
    log_of,
    make_runner,
    snapshot,
    split,
    tiny_model,
)
from mmdenoiserep import fuse_state_dict
from mmdenoiserep.core import DenoiseLayer

JOINT = dict(type='DenoiseLossHook', mode='joint', weight=0.1)
FUSION = dict(type='DenoiseFusionHook')
START = dict(type='Randomise')


@HOOKS.register_module()
class Poison(Hook):
    priority = 'ABOVE_NORMAL'

    def __init__(self, epoch):
        self.epoch = epoch

    def after_train_epoch(self, runner):
        denoiser = inner(runner).backbone.conv.denoiser.weight
        if runner.epoch + 1 == self.epoch:
            self.good = denoiser.detach().clone()
            denoiser.data.view(-1)[0] = float('nan')

    def before_train_epoch(self, runner):
        if runner.epoch == self.epoch:
            inner(runner).backbone.conv.denoiser.weight.data.copy_(self.good)


ADAM = dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr=0.01))


def run(case, hooks=(JOINT, START, FUSION), checkpoint=None, scores=None, by_epoch=True, length=3, **changes):
    """Trains for some epochs of four iterations (or some iterations); saves and validates after each."""
    checkpoint = dict(type='CheckpointHook', interval=1, by_epoch=by_epoch) | (checkpoint or {})
    if by_epoch:
        changes['train_cfg'] = dict(by_epoch=True, max_epochs=length)
        changes['val_evaluator'] = dict(type='CountingMetric', **(scores or dict(acc=[0.1] * length)))
    hooks_by_default = dict(checkpoint=checkpoint)
    runner = make_runner(
        case, tiny_model(), hooks, by_epoch, iterations=length, optim=ADAM, default_hooks=hooks_by_default, **changes
    )
    runner.train()
    return runner, Path(runner.work_dir)


def load(path):
    return torch.load(path, map_location='cpu', weights_only=False)


def assert_fused(folder, names):
    """Asserts that the folder holds these checkpoints and their fused copies, and that the copies are right."""
    assert names and files(folder) == set(names) | {name.replace('.pth', '_fused.pth') for name in names}
    for name in names:
        state = load(folder / name)['state_dict']
        fused = torch.load(folder / name.replace('.pth', '_fused.pth'), weights_only=True)
        assert set(fused) == {'meta', 'state_dict'}
        assert fused['meta']['denoiserep']['fused'] is True
        assert_equal(dict(fused['state_dict']), dict(fuse_state_dict(state)))
        assert not any(map(is_denoiser, fused['state_dict']))
        assert not torch.equal(fused['state_dict']['backbone.conv.weight'], state['backbone.conv.weight'])


@pytest.mark.parametrize('by_epoch', [True, False])
@pytest.mark.parametrize('keep', [-1, 1, 2])
def test_every_kept_checkpoint_has_its_copy(case, keep, by_epoch):
    """The copies of removed checkpoints are gone."""
    runner, folder = run(case, by_epoch=by_epoch, checkpoint=dict(max_keep_ckpts=keep))
    kept = [f'{"epoch" if by_epoch else "iter"}_{i}.pth' for i in (1, 2, 3)][-keep if keep > 0 else 0 :]
    assert_fused(folder, kept)
    assert log_of(runner).count('Fused copy for the config without denoising') == 3


ONE = dict(max_keep_ckpts=1, rule='greater')


@pytest.mark.parametrize(
    ('checkpoint', 'scores', 'names'),
    [
        (dict(interval=2, save_last=True), None, ['epoch_2.pth', 'epoch_3.pth']),
        (dict(filename_tmpl='latest.pth'), None, ['latest.pth']),
        (ONE | dict(save_best='acc'), dict(acc=[0.1, 0.3, 0.2]), ['epoch_3.pth', 'best_acc_epoch_2.pth']),
        (
            ONE | dict(save_best=['acc', 'miou']),
            dict(acc=[0.1, 0.3, 0.2], miou=[0.5, 0.4, 0.6]),
            ['epoch_3.pth', 'best_acc_epoch_2.pth', 'best_miou_epoch_3.pth'],
        ),
    ],
    ids=['at the end', 'written again', 'best', 'best of several metrics'],
)
def test_checkpoints_of_all_kinds(case, checkpoint, scores, names):
    _, folder = run(case, checkpoint=checkpoint, scores=scores)
    assert_fused(folder, names)
    last = names[0] if len(names) == 1 else 'epoch_3.pth'
    assert load(folder / last.replace('.pth', '_fused.pth'))['meta']['epoch'] == 3


@pytest.mark.parametrize('best', [False, True])
def test_averaged_weights(case, best):
    """With EMAHook the average is fused, also of the best checkpoint, around which the validation swaps weights."""
    checkpoint = dict(save_best='acc', rule='greater') if best else {}
    hooks = [JOINT, START, dict(type='EMAHook', momentum=0.3), FUSION]
    runner, folder = run(case, hooks, checkpoint, dict(acc=[0.1, 0.2]), length=2)
    names = ['epoch_1.pth', 'epoch_2.pth', *(['best_acc_epoch_2.pth'] if best else [])]
    assert_fused(folder, names)
    fused = load(folder / names[-1].replace('.pth', '_fused.pth'))['state_dict']
    assert_equal(dict(fused), dict(fuse_state_dict(average_of(runner).state_dict())))
    last = fuse_state_dict(inner(runner).state_dict())
    assert not torch.allclose(fused['backbone.conv.weight'], last['backbone.conv.weight'], rtol=1e-4)


@pytest.mark.parametrize('by_path', [True, False])
def test_after_resume(case, by_path, resumable):
    """A resumed run removes the copies of the checkpoints that it removes, however it was told to resume."""
    checkpoint = dict(max_keep_ckpts=2, save_best='acc', rule='greater')
    _, folder = run(case, length=2, checkpoint=checkpoint, scores=dict(acc=[0.1, 0.2]))
    assert_fused(folder, ['epoch_1.pth', 'epoch_2.pth', 'best_acc_epoch_2.pth'])
    resume = dict(resume=True, load_from=str(folder / 'epoch_2.pth') if by_path else None)
    runner, _ = run(case, [JOINT, FUSION], length=4, checkpoint=checkpoint, scores=dict(acc=[0.1, 0.3]), **resume)
    assert runner.epoch == 4
    assert_fused(folder, ['epoch_3.pth', 'epoch_4.pth', 'best_acc_epoch_4.pth'])


def test_resume_makes_up_for_a_copy_that_is_missing(case, resumable):
    """As of a run that ended between writing a checkpoint and fusing it."""
    _, folder = run(case, length=1)
    (folder / 'epoch_1_fused.pth').unlink()
    run(case, [JOINT, FUSION], length=2, resume=True, load_from=str(folder / 'epoch_1.pth'))
    assert_fused(folder, ['epoch_1.pth', 'epoch_2.pth'])


def test_other_files_are_left_alone(case):
    folder = Path(case.temp_dir.name)
    for name in ('other.pth', 'mine_fused.pth'):
        torch.save(dict(state_dict=dict(x=torch.ones(1))), folder / name)
    run(case, checkpoint=dict(max_keep_ckpts=1), work_dir=str(folder))
    assert files(folder) == {'other.pth', 'mine_fused.pth', 'epoch_3.pth', 'epoch_3_fused.pth'}


def test_live_model_is_untouched(case):
    """Bitwise the same training with and without the hook, and the model still has its denoisers."""
    runners = [run(case, hooks)[0] for hooks in ([JOINT, START, FUSION], [JOINT, START])]
    for runner in runners:
        assert sum(isinstance(m, DenoiseLayer) for m in inner(runner).modules()) == 3
    states = [snapshot(inner(runner)) for runner in runners]
    assert_equal(*states)
    assert any((value != 0).any() for value in split(states[0])[0].values())


def test_checkpoint_that_cannot_be_fused(case):
    """A NaN in a denoiser is an error in the log; training goes on, and there is no copy, not even an old one."""
    folder = Path(case.temp_dir.name)
    torch.save(dict(state_dict={}), folder / 'epoch_2_fused.pth')
    runner, _ = run(case, [JOINT, START, dict(type='Poison', epoch=2), FUSION], work_dir=str(folder))
    assert runner.epoch == 3
    assert files(folder) == {'epoch_1.pth', 'epoch_1_fused.pth', 'epoch_2.pth', 'epoch_3.pth', 'epoch_3_fused.pth'}
    errors = [line for line in log_of(runner).splitlines() if 'ERROR' in line]
    assert len(errors) == 1
    assert 'backbone.conv' in errors[0] and 'NaN' in errors[0] and 'epoch_2.pth' in errors[0]


def test_copy_that_cannot_be_written(case):
    """A place that can't be written to costs the copy and an error in the log, nothing else."""
    folder = Path(case.temp_dir.name)
    (folder / 'epoch_1_fused.pth').mkdir()
    runner, _ = run(case, length=2, work_dir=str(folder), checkpoint=dict(max_keep_ckpts=1))
    assert runner.epoch == 2
    assert (folder / 'epoch_1_fused.pth').is_dir()
    assert (folder / 'epoch_2_fused.pth').is_file()
    assert any('ERROR' in line and 'no fused copy' in line for line in log_of(runner).splitlines())
    assert [path.name for path in folder.iterdir() if path.suffix == '.part'] == []


def test_vanilla_model_with_the_fusion_hook(case):
    """Without denoisers there is nothing to fuse, which is an error in the log and no reason to stop."""
    checkpoint = dict(type='CheckpointHook', interval=1, by_epoch=False)
    model = tiny_model(dict(type='TinyBackbone'))
    runner = make_runner(case, model, [FUSION], default_hooks=dict(checkpoint=checkpoint))
    runner.train()
    assert files(runner.work_dir) == {'iter_1.pth'}
    assert 'no denoiser' in log_of(runner)


def test_validation_without_training(case):
    runner = make_runner(
        case, tiny_model(), [FUSION], by_epoch=True, val_evaluator=dict(type='CountingMetric', acc=[0.5])
    )
    assert runner.val() == dict(acc=0.5)
    assert files(runner.work_dir) == set()
