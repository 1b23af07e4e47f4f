"""DenoiseFusionHook: fused copies beside exactly the checkpoints that a run keeps."""

from pathlib import Path

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.registry import HOOKS, MODELS

from engine_helpers import (
    assert_equal,
    files,
    inner,
    is_denoiser,
    make_runner,
    runner_case,
    snapshot,
    split,
    tiny_model,
)
from mmdenoiserep import fuse_state_dict
from mmdenoiserep.core import DenoiseLayer
from mmdenoiserep.engine.resume import allow_training_checkpoints

JOINT = dict(type='DenoiseLossHook', mode='joint', weight=0.1)
FUSION = dict(type='DenoiseFusionHook')
START = dict(type='Randomise')


@pytest.fixture
def case():
    with runner_case() as case:
        yield case


@pytest.fixture
def resumable():
    """Lets mmengine resume from its own checkpoints, for one test."""
    allowed = torch.serialization.get_safe_globals()
    allow_training_checkpoints()
    yield
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(allowed)


@HOOKS.register_module()
class Poison(Hook):
    """Puts a NaN into a denoiser for the time of one checkpoint."""

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


def run(case, hooks=(JOINT, START, FUSION), checkpoint=None, scores=None, by_epoch=True, length=3, **changes):
    """Trains for some epochs of four iterations (or some iterations), with a checkpoint and a validation after each."""
    checkpoint = dict(type='CheckpointHook', interval=1, by_epoch=by_epoch, **(checkpoint or {}))
    changes = dict(
        default_hooks=dict(checkpoint=checkpoint),
        train_cfg=dict(by_epoch=True, max_epochs=length) if by_epoch else dict(by_epoch=False, max_iters=length),
        optim_wrapper=dict(optimizer=dict(type='AdamW', lr=0.01)),
        **changes,
    )
    if by_epoch:
        changes['val_evaluator'] = dict(type='CountingMetric', **(scores or dict(acc=[0.1] * length)))
    runner = make_runner(case, tiny_model(), list(hooks), by_epoch=by_epoch, **changes)
    runner.train()
    return runner


def load(path):
    return torch.load(path, map_location='cpu', weights_only=False)


def log(runner):
    return Path(runner._log_dir, f'{runner.timestamp}.log').read_text()


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


@pytest.mark.parametrize('keep', [-1, 1, 2])
def test_by_epoch(case, keep):
    """Every kept checkpoint has its fused copy, and the copies of removed checkpoints are gone."""
    runner = run(case, checkpoint=dict(max_keep_ckpts=keep))
    kept = [f'epoch_{epoch}.pth' for epoch in (1, 2, 3)][-keep if keep > 0 else 0 :]
    assert_fused(Path(runner.work_dir), kept)
    assert log(runner).count('Fused copy for the config without denoising') == 3


@pytest.mark.parametrize('keep', [-1, 2])
def test_by_iteration(case, keep):
    """The same where CheckpointHook counts iterations."""
    runner = run(case, by_epoch=False, length=4, checkpoint=dict(max_keep_ckpts=keep))
    kept = [f'iter_{iteration}.pth' for iteration in (1, 2, 3, 4)][-keep if keep > 0 else 0 :]
    assert_fused(Path(runner.work_dir), kept)


def test_save_last(case):
    """A checkpoint that is only written because the run ends is fused too."""
    checkpoint = dict(type='CheckpointHook', interval=2, by_epoch=True, save_last=True)
    runner = make_runner(
        case,
        tiny_model(),
        [JOINT, START, FUSION],
        by_epoch=True,
        train_cfg=dict(by_epoch=True, max_epochs=3),
        default_hooks=dict(checkpoint=checkpoint),
        optim_wrapper=dict(optimizer=dict(type='AdamW', lr=0.01)),
    )
    runner.train()
    assert_fused(Path(runner.work_dir), ['epoch_2.pth', 'epoch_3.pth'])


def test_checkpoint_that_is_written_again(case):
    """A run that keeps one file and writes it anew has the fused copy of its last content."""
    runner = run(case, checkpoint=dict(filename_tmpl='latest.pth'))
    assert_fused(Path(runner.work_dir), ['latest.pth'])
    assert load(Path(runner.work_dir, 'latest_fused.pth'))['meta']['epoch'] == 3


def test_save_best(case):
    """The best checkpoint moves on twice, and its fused copy with it."""
    runner = run(
        case, scores=dict(acc=[0.1, 0.3, 0.2]), checkpoint=dict(max_keep_ckpts=1, save_best='acc', rule='greater')
    )
    assert_fused(Path(runner.work_dir), ['epoch_3.pth', 'best_acc_epoch_2.pth'])


def test_save_best_of_several_metrics(case):
    """Every best checkpoint has its own fused copy."""
    runner = run(
        case,
        scores=dict(acc=[0.1, 0.3, 0.2], miou=[0.5, 0.4, 0.6]),
        checkpoint=dict(max_keep_ckpts=1, save_best=['acc', 'miou'], rule='greater'),
    )
    assert_fused(Path(runner.work_dir), ['epoch_3.pth', 'best_acc_epoch_2.pth', 'best_miou_epoch_3.pth'])


def test_averaged_weights(case):
    """With EMAHook the fused copy has the averaged weights, not the last ones."""
    runner = run(case, [JOINT, START, dict(type='EMAHook', momentum=0.3), FUSION], length=2)
    folder = Path(runner.work_dir)
    assert_fused(folder, ['epoch_1.pth', 'epoch_2.pth'])
    fused = load(folder / 'epoch_2_fused.pth')['state_dict']
    average = next(hook for hook in runner.hooks if hasattr(hook, 'ema_model')).ema_model.module
    assert_equal(dict(fused), dict(fuse_state_dict(average.state_dict())))
    last = fuse_state_dict(inner(runner).state_dict())
    assert not torch.allclose(fused['backbone.conv.weight'], last['backbone.conv.weight'], rtol=1e-4)


def test_best_of_averaged_weights(case):
    """The validation swaps weights around the best checkpoint; what is fused is what was validated."""
    hooks = [JOINT, START, dict(type='EMAHook', momentum=0.3), FUSION]
    runner = run(case, hooks, scores=dict(acc=[0.1, 0.2]), length=2, checkpoint=dict(save_best='acc', rule='greater'))
    folder = Path(runner.work_dir)
    assert_fused(folder, ['epoch_1.pth', 'epoch_2.pth', 'best_acc_epoch_2.pth'])
    average = next(hook for hook in runner.hooks if hasattr(hook, 'ema_model')).ema_model.module
    fused = load(folder / 'best_acc_epoch_2_fused.pth')['state_dict']
    assert_equal(dict(fused), dict(fuse_state_dict(average.state_dict())))


@pytest.mark.parametrize('by_path', [True, False])
def test_after_resume(case, by_path, resumable):
    """A resumed run removes the fused copies of the checkpoints that it removes, however it was told to resume."""
    checkpoint = dict(max_keep_ckpts=2, save_best='acc', rule='greater')
    runner = run(case, length=2, checkpoint=checkpoint, scores=dict(acc=[0.1, 0.2]))
    folder = Path(runner.work_dir)
    assert_fused(folder, ['epoch_1.pth', 'epoch_2.pth', 'best_acc_epoch_2.pth'])
    resume = dict(resume=True, load_from=str(folder / 'epoch_2.pth') if by_path else None)
    runner = run(case, [JOINT, FUSION], length=4, checkpoint=checkpoint, scores=dict(acc=[0.1, 0.3]), **resume)
    assert runner.epoch == 4
    assert_fused(folder, ['epoch_3.pth', 'epoch_4.pth', 'best_acc_epoch_4.pth'])


def test_resume_makes_up_for_a_copy_that_is_missing(case, resumable):
    """A run that ended between writing a checkpoint and fusing it is completed by the resumed one."""
    runner = run(case, length=1)
    folder = Path(runner.work_dir)
    (folder / 'epoch_1_fused.pth').unlink()
    run(case, [JOINT, FUSION], length=2, resume=True, load_from=str(folder / 'epoch_1.pth'))
    assert_fused(folder, ['epoch_1.pth', 'epoch_2.pth'])


def test_other_files_are_left_alone(case):
    """Files that are no fused copies of this run's checkpoints stay, also vanilla files that lie in the folder."""
    folder = Path(case.temp_dir.name)
    for name in ('other.pth', 'mine_fused.pth'):
        torch.save(dict(state_dict=dict(x=torch.ones(1))), folder / name)
    run(case, checkpoint=dict(max_keep_ckpts=1), work_dir=str(folder))
    assert files(folder) == {'other.pth', 'mine_fused.pth', 'epoch_3.pth', 'epoch_3_fused.pth'}


def test_live_model_is_untouched(case):
    """Bitwise the same training with and without the hook, and the model still has its denoisers."""
    states = []
    for hooks in ([JOINT, START, FUSION], [JOINT, START]):
        runner = run(case, hooks)
        states.append(snapshot(inner(runner)))
        assert sum(isinstance(m, DenoiseLayer) for m in inner(runner).modules()) == 3
    assert_equal(*states)
    assert any((value != 0).any() for value in split(states[0])[0].values())


def test_fused_copy_is_the_vanilla_model(case):
    """It strict-loads into the config without denoising and gives the outputs of the denoised checkpoint."""
    runner = run(case, length=1)
    folder = Path(runner.work_dir)
    vanilla, ours = MODELS.build(tiny_model(dict(type='TinyBackbone'))), MODELS.build(tiny_model())
    vanilla.load_state_dict(torch.load(folder / 'epoch_1_fused.pth', weights_only=True)['state_dict'], strict=True)
    ours.load_state_dict(load(folder / 'epoch_1.pth')['state_dict'], strict=True)
    vanilla.double().eval()
    ours.double().eval()
    images = torch.randn(4, 3, 9, 9, dtype=torch.float64)
    with torch.no_grad():
        expected = ours(images)
        # the file holds weights rounded to float32
        assert (vanilla(images) - expected).abs().max() <= 1e-5 * expected.abs().max()
        for layer in ours.modules():
            if isinstance(layer, DenoiseLayer):
                for parameter in layer.denoiser.parameters():
                    parameter.zero_()
        assert (ours(images) - expected).abs().max() > 1e-2 * expected.abs().max()


def test_checkpoint_that_cannot_be_fused(case):
    """A NaN in a denoiser is an error in the log; training goes on, and there is no copy, not even an old one."""
    folder = Path(case.temp_dir.name)
    torch.save(dict(state_dict={}), folder / 'epoch_2_fused.pth')
    runner = run(case, [JOINT, START, dict(type='Poison', epoch=2), FUSION], work_dir=str(folder))
    assert runner.epoch == 3
    assert files(folder) == {'epoch_1.pth', 'epoch_1_fused.pth', 'epoch_2.pth', 'epoch_3.pth', 'epoch_3_fused.pth'}
    errors = [line for line in log(runner).splitlines() if 'ERROR' in line]
    assert len(errors) == 1
    assert 'backbone.conv' in errors[0] and 'NaN' in errors[0] and 'epoch_2.pth' in errors[0]


def test_copy_that_cannot_be_written(case):
    """A place that can't be written to costs the copy and an error in the log, nothing else."""
    folder = Path(case.temp_dir.name)
    (folder / 'epoch_1_fused.pth').mkdir()
    runner = run(case, length=2, work_dir=str(folder), checkpoint=dict(max_keep_ckpts=1))
    assert runner.epoch == 2
    assert (folder / 'epoch_1_fused.pth').is_dir()
    assert (folder / 'epoch_2_fused.pth').is_file()
    assert any('ERROR' in line and 'no fused copy' in line for line in log(runner).splitlines())
    assert [path.name for path in folder.iterdir() if path.suffix == '.part'] == []


def test_vanilla_model_with_the_fusion_hook(case):
    """Without denoisers there is nothing to fuse, which is an error in the log and no reason to stop."""
    runner = make_runner(
        case,
        tiny_model(dict(type='TinyBackbone')),
        [FUSION],
        default_hooks=dict(checkpoint=dict(type='CheckpointHook', interval=1, by_epoch=False)),
    )
    runner.train()
    assert files(runner.work_dir) == {'iter_1.pth'}
    assert 'no denoiser' in log(runner)


def test_validation_without_training(case):
    """The hook has nothing to do in runner.val()."""
    runner = make_runner(
        case, tiny_model(), [FUSION], by_epoch=True, val_evaluator=dict(type='CountingMetric', acc=[0.5])
    )
    assert runner.val() == dict(acc=0.5)
    assert files(runner.work_dir) == set()
