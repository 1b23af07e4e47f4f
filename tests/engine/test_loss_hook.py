"""DenoiseLossHook: what it adds, what it leaves alone, and every way of training that could break it."""

import builtins
import copy

import mmdet.models  # noqa: F401
import mmpretrain.models  # noqa: F401
import pytest
import torch
import torch.multiprocessing
from mmengine.hooks import Hook
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.registry import HOOKS, MODELS
from mmengine.testing.runner_test_case import ToyDataset
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from engine_distributed import WORLD, run_scenario, scenarios, worker
from engine_helpers import (
    TINY_SWIN,
    FeatureModel,
    TinyBackbone,
    TinyModel,
    assert_equal,
    average_of,
    denoised,
    gradients,
    inner,
    is_denoiser,
    log_of,
    make_runner,
    message,
    refuse,
    snapshot,
    split,
    tiny_model,
    train,
)
from helpers import randomise
from mmdenoiserep import NoiseSchedule, apply_denoiserep, fuse_model
from mmdenoiserep.core import DenoiseLayer
from mmdenoiserep.core.method.record import find_records
from mmdenoiserep.core.method.sample import Sample
from mmdenoiserep.engine.loss_hook import SOON, DenoiseLossHook

JOINT = dict(type='DenoiseLossHook', mode='joint', weight=0.1, tokens=None)
LABEL_FREE = dict(type='DenoiseLossHook', mode='label_free', tokens=None)
SWIN = TINY_SWIN | dict(type='mmdet.SwinTransformer', drop_path_rate=0.0)
RESNET = dict(type='mmpretrain.ResNet', depth=18, stem_channels=8, base_channels=8, out_indices=(3,))
CONVNEXT = dict(
    type='mmpretrain.ConvNeXt', arch=dict(depths=[1, 1, 1, 1], channels=[4, 8, 8, 12]), gap_before_final_norm=False
)
LITTLE = 1e-6
"""Below the gradients of the base and of the denoisers, so that a clipping at it shows."""

both_modes = pytest.mark.parametrize('hook', [JOINT, LABEL_FREE])


@HOOKS.register_module()
class Unguard(Hook):
    """Makes a control: trains a denoised model as it is, without the loss of its denoisers."""

    def before_train(self, runner):
        for _, _, record in find_records(inner(runner)):
            record.has_loss = True


@HOOKS.register_module()
class Watch(Hook):
    """Keeps the losses that the model returns, and the inputs of every denoised layer in the open forward."""

    priority = 'LOWEST'

    def before_train(self, runner):
        self.losses, self.inputs, self.calls, self.open = [], [], {}, False
        model = inner(runner)
        model.register_forward_pre_hook(self.begin)
        model.register_forward_hook(self.end)
        for name, layer in denoised_layers(model).items():
            layer.register_forward_pre_hook(lambda layer, args, name=name: self.hear(name, args[0]))

    def begin(self, module, args):
        self.open = True
        self.inputs.append({})

    def end(self, module, args, output):
        self.open = False
        self.losses.append(output)

    def hear(self, name, x):
        self.calls[name] = self.calls.get(name, 0) + 1
        if self.open:
            self.inputs[-1].setdefault(name, []).append(x.detach().clone())


def denoised_layers(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, DenoiseLayer)}


def find_hook(runner, kind):
    return next(hook for hook in runner.hooks if isinstance(hook, kind))


def watched(case, model, hook, **changes):
    runner = train(case, model, [hook, dict(type='Watch')], **changes)
    return runner, find_hook(runner, Watch)


def features_of(backbone, size=16, **options):
    return dict(type='FeatureModel', backbone=denoised(backbone, image_size=size)) | options


def token_rows(layer, inputs):
    if isinstance(layer, nn.Linear):
        return torch.cat([x.flatten(0, -2) for x in inputs])
    rows = torch.cat([x.transpose(0, 1).flatten(1) for x in inputs], 1)
    return rows[None, :, :, None]


def expected_loss(model, inputs, weight=1.0):
    """The weighted mean over layers of the loss on all tokens that the layer saw, its curvature limited to 1."""
    layers, limit = denoised_layers(model), len(inputs) / weight
    losses = [layers[name].denoise_loss(token_rows(layers[name], seen), limit) for name, seen in inputs.items()]
    return weight * torch.stack(losses).mean()


@pytest.mark.parametrize('views', [1, 2])
@both_modes
def test_value_of_the_loss(case, hook, views):
    """The mean over layers of the loss over all tokens, also of layers that are called several times."""
    runner, watch = watched(case, tiny_model(views=views), hook)
    inputs = watch.inputs[0]
    assert {name: len(seen) for name, seen in inputs.items()} == {
        'backbone.stem': views,
        'backbone.conv': views,
        'backbone.shared': 2 * views,
    }
    own = split(gradients(runner))[0]
    assert own
    for name, gradient in own.items():  # back to the denoisers that the loss was computed with
        inner(runner).get_parameter(name).data.add_(gradient, alpha=0.1)
    loss = watch.losses[0]['loss_denoise']
    torch.testing.assert_close(loss, expected_loss(inner(runner), inputs, hook.get('weight', 1)), rtol=1e-4, atol=0)
    assert loss > 0


def test_loss_is_logged_and_summed_like_any_other(case):
    runner, watch = watched(case, tiny_model(), JOINT)
    scalars = {key: buffer.current() for key, buffer in runner.message_hub.log_scalars.items()}
    assert scalars['train/loss'] == pytest.approx(scalars['train/loss_cls'] + scalars['train/loss_denoise'], rel=1e-6)
    assert scalars['train/loss_denoise'] > 0
    total, logged = inner(runner).parse_losses(watch.losses[0])
    assert logged['loss_denoise'].item() == pytest.approx(scalars['train/loss_denoise'])
    assert total.item() == pytest.approx(scalars['train/loss'])
    assert 'loss_denoise: ' in log_of(runner)


@pytest.mark.parametrize('backbone', [dict(type='TinyBackbone'), SWIN, CONVNEXT, RESNET])
def test_joint_leaves_the_gradients_of_the_base_alone(case, backbone):
    """Bitwise the gradients of a run without the hook; the denoisers get the limited gradient of the weighted loss."""
    model = features_of(backbone, 32)
    control = gradients(train(case, model, [dict(type='Unguard')], size=32))
    base = split(control)[1]
    assert not split(control)[0]
    assert any(value.abs().max() > 0 for value in base.values())
    for hook in (JOINT, JOINT | dict(weight=1e-9)):
        runner, watch = watched(case, model, hook, size=32)
        own, actual = split(gradients(runner))
        assert_equal(actual, base)
        fresh = randomise(MODELS.build(model))
        expected_loss(fresh, watch.inputs[0], hook['weight']).backward()
        expected = {key: p.grad for key, p in fresh.named_parameters() if is_denoiser(key)}
        scale = max(value.abs().max() for value in expected.values()).item()
        assert scale > 0
        assert_equal(own, expected, rtol=1e-4, atol=1e-5 * scale)


def test_label_free_trains_the_denoisers_and_nothing_else(case):
    """After five steps with weight decay and momentum the base and all BatchNorm buffers are bitwise as before."""
    optim = dict(optimizer=dict(type='SGD', lr=0.1, momentum=0.9, weight_decay=0.1))
    runner = make_runner(case, tiny_model(), [dict(type='Randomise'), LABEL_FREE], iterations=5, optim=optim)
    before = snapshot(randomise(inner(runner)))
    runner.train()
    after = snapshot(inner(runner))
    assert_equal(split(after)[1], split(before)[1])
    assert all(not torch.equal(after[key], before[key]) for key in split(before)[0])
    for step in range(5):
        assert gradients(runner, step) and all(map(is_denoiser, gradients(runner, step)))
    assert all(p.grad is None for key, p in inner(runner).named_parameters() if not is_denoiser(key))


@MODELS.register_module()
class SeesGradient(TinyBackbone):
    seen: list = []

    def forward(self, x):
        self.seen.append((torch.is_grad_enabled(), super().forward(x)[0].requires_grad))
        if len(self.seen) > 5:
            raise ArithmeticError
        return super().forward(x)


def test_label_free_needs_no_gradient_of_the_model(case):
    """The model's own forward keeps nothing for a backward pass; afterwards, and after an error, gradients are on."""
    model = tiny_model(denoised(dict(type='SeesGradient')))
    for hook, expected in ((LABEL_FREE, (False, False)), (JOINT, (True, True))):
        SeesGradient.seen.clear()
        train(case, model, [hook])
        assert SeesGradient.seen[-1] == expected and torch.is_grad_enabled()
    SeesGradient.seen.clear()
    with pytest.raises(ArithmeticError):
        train(case, model, [LABEL_FREE], iterations=6)
    assert torch.is_grad_enabled()


def test_a_part_of_the_tokens(case):
    """The tokens depend on the iteration alone; nothing else of the training changes by the choice."""
    runs = [watched(case, tiny_model(), JOINT | dict(tokens=tokens), iterations=2) for tokens in (5, 5, 6, None)]
    losses = [[output['loss_denoise'].item() for output in watch.losses] for _, watch in runs]
    assert losses[0] == losses[1]
    assert len({loss[0] for loss in losses}) == 3
    for runner, _ in runs[1:]:
        assert_equal(split(gradients(runner))[1], split(gradients(runs[0][0]))[1])

    layers = denoised_layers(randomise(MODELS.build(tiny_model())))
    for seed in (0, 1):
        sample, expected = Sample(most=5, seed=seed), []
        for name, seen in runs[0][1].inputs[0].items():
            total = sum(x.numel() for x in seen)
            parts = [(sample(layers[name], x), x.numel() / total) for x in seen]
            expected.append(layers[name].denoise_loss_of(parts))
        same = losses[0][0] == pytest.approx(0.1 * sum(expected).item() / len(expected), rel=1e-4)
        assert same == (seed == 0)


def test_label_free_without_the_care_would_drift(case, monkeypatch):
    monkeypatch.setattr(DenoiseLossHook, 'before_train_iter', Hook.before_train_iter)
    runner = make_runner(case, tiny_model(), [dict(type='Randomise'), LABEL_FREE])
    before = snapshot(randomise(inner(runner)))
    runner.train()
    after = snapshot(inner(runner))
    for norm in ('backbone.bn1', 'backbone.bn2', 'norm'):
        assert not torch.equal(after[f'{norm}.running_mean'], before[f'{norm}.running_mean'])
        assert not torch.equal(after[f'{norm}.running_var'], before[f'{norm}.running_var'])


@MODELS.register_module()
class CachingBackbone(TinyBackbone):
    def train(self, mode=True):
        super().train(mode)
        self.__dict__.pop('cache', None)
        if not mode:
            self.cache = 1.0

    def forward(self, x):
        features = super().forward(x)
        return features if self.training else (features[0] + self.cache,)


def test_label_free_calls_eval_of_the_backbone(case):
    runner = train(case, tiny_model(denoised(dict(type='CachingBackbone'))), [LABEL_FREE])
    assert not inner(runner).backbone.training
    assert gradients(runner)


@MODELS.register_module()
class WithInstanceNorm(TinyModel):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.neck = nn.InstanceNorm2d(3, track_running_stats=True)

    def forward(self, inputs, data_samples=None, mode='tensor'):
        return super().forward(self.neck(torch.stack(inputs)), data_samples, mode)


@both_modes
def test_label_free_holds_running_statistics_of_any_norm(case, hook):
    runner = train(case, tiny_model() | dict(type='WithInstanceNorm'), [hook], iterations=2)
    assert torch.equal(inner(runner).neck.running_mean, torch.zeros(3)) is (hook is LABEL_FREE)


@pytest.mark.parametrize('backbone', [SWIN, RESNET, RESNET | dict(type='mmdet.ResNet', norm_eval=False)])
@both_modes
def test_activation_checkpointing(case, backbone, hook):
    """with_cp runs layers twice, which changes neither the loss nor a gradient."""
    (plain, first), (checkpointed, second) = (
        watched(case, features_of(backbone | dict(with_cp=with_cp)), hook, size=16) for with_cp in (False, True)
    )
    assert torch.equal(first.losses[0]['loss_denoise'], second.losses[0]['loss_denoise'])
    assert_equal(gradients(checkpointed), gradients(plain))
    assert first.calls == {name: 1 for name in first.calls}
    twice = [name for name in first.calls if second.calls[name] == 2]
    assert bool(twice) is (hook is JOINT)  # the test would show nothing if no layer ran twice


@both_modes
def test_activation_checkpointing_of_the_runner(case, hook):
    (plain, first), (checkpointed, second) = (
        watched(case, tiny_model(), hook, **options) for options in ({}, dict(activation_checkpointing=['backbone']))
    )
    assert torch.equal(first.losses[0]['loss_denoise'], second.losses[0]['loss_denoise'])
    expected = split(gradients(plain))[0]
    scale = max(value.abs().max() for value in expected.values()).item()
    # a shared layer's gradients add up in another order
    assert_equal(split(gradients(checkpointed))[0], expected, rtol=1e-5, atol=1e-6 * scale)


def test_bf16_autocast(case):
    """Under autocast the layers see bf16, and the loss is computed in float32 from what they saw."""
    runner, watch = watched(case, tiny_model(), JOINT, optim=dict(type='AutocastWrapper'))
    inputs = watch.inputs[0]
    assert inputs['backbone.shared'][0].dtype == torch.bfloat16
    loss = watch.losses[0]['loss_denoise']
    assert loss.dtype == torch.float32
    fresh = randomise(MODELS.build(tiny_model()))
    torch.testing.assert_close(loss, expected_loss(fresh, inputs, 0.1), rtol=1e-5, atol=0)
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in gradients(runner).values())
    assert set(split(gradients(runner))[0]) == {key for key, _ in fresh.named_parameters() if is_denoiser(key)}


@both_modes
def test_gradient_accumulation(case, hook):
    model = tiny_model(denoised(dict(type='TinyBackbone', norm=False)), norm=False)
    whole = train(case, model, [hook])
    loader = dict(case.iter_based_cfg.train_dataloader.to_dict(), batch_size=2, dataset=dict(type='TinyDataset'))
    loader['sampler'] = dict(type='InfiniteSampler', shuffle=False)
    halves = train(case, model, [hook], train_dataloader=loader, iterations=2, optim=dict(accumulative_counts=2))
    assert len(halves.optim_wrapper.gradients) == len(whole.optim_wrapper.gradients) == 1
    assert_equal(gradients(halves), gradients(whole), rtol=1e-4, atol=1e-6)
    assert split(gradients(whole))[0]


@pytest.fixture(scope='module')
def distributed(tmp_path_factory):
    """Results of all scenarios of engine_distributed: of one process, and of each of two."""
    folder = tmp_path_factory.mktemp('distributed')
    torch.multiprocessing.spawn(worker, (str(folder),), nprocs=WORLD)
    names = [name for name in scenarios() if name != 'refused']
    alone = {name: run_scenario(scenarios()[name], 1, str(folder / f'alone_{name}')) for name in names}
    ranks = [torch.load(folder / f'rank{rank}.pth', weights_only=True) for rank in range(WORLD)]
    return folder, alone, ranks


@pytest.mark.parametrize('name', ['joint', 'label_free', 'label_free_synced'])
def test_two_processes_give_the_gradients_of_one(distributed, name):
    """DDP on two gloo processes: the gradients and weights of one process on the same global batch, on both ranks."""
    _, alone, ranks = distributed
    for rank in ranks:
        assert len(rank[name]['gradients']) == 2
        for ours, theirs in zip(rank[name]['gradients'], alone[name]['gradients'], strict=True):
            assert split(theirs)[0]
            assert bool(split(theirs)[1]) is (name == 'joint')
            assert_equal(ours, theirs, rtol=1e-4, atol=1e-6)
        assert_equal(rank[name]['state'], alone[name]['state'], rtol=1e-4, atol=1e-6)
    assert_equal(ranks[0][name]['state'], ranks[1][name]['state'])
    logged = sum(rank[name]['loss'] for rank in ranks) / WORLD
    assert logged == pytest.approx(alone[name]['loss'], rel=1e-5)


def test_label_free_on_two_processes_keeps_the_base(distributed):
    """Weights and BatchNorm buffers of the base are bitwise those of one process, with SyncBuffersHook too."""
    _, alone, ranks = distributed
    for name in ('label_free', 'label_free_synced'):
        for rank in ranks:
            assert_equal(split(rank[name]['state'])[1], split(alone[name]['state'])[1])


def test_sync_buffers_hook_in_joint_training(distributed):
    """The buffers differ from process to process until SyncBuffersHook averages them; denoisers have none."""
    assert_equal(*(rank['joint_synced']['state'] for rank in distributed[2]))
    buffers = dict(MODELS.build(tiny_model()).named_buffers())
    assert buffers and not any(map(is_denoiser, buffers))


def test_label_free_on_several_processes_needs_the_flag(distributed):
    """Without find_unused_parameters one sentence says so, on every rank, before anything is trained."""
    for rank in distributed[2]:
        assert 'add find_unused_parameters = True to the config' in rank['refused']['error']
        assert '\n' not in rank['refused']['error']


def test_only_the_main_process_writes_fused_copies(distributed):
    folder, _, ranks = distributed
    copies = ['iter_1_fused.pth', 'iter_2_fused.pth']
    assert [rank['label_free_synced']['written'] for rank in ranks] == [copies, []]
    assert sorted(path.name for path in (folder / 'label_free_synced').glob('*_fused.pth')) == copies


@pytest.mark.parametrize('order', [1, -1])
def test_ema_copy_holds_no_listeners(case, order):
    """EMAHook's copy of the model is neither listened to nor trained; its average follows the denoisers."""
    seen = []

    class Look(Hook):
        priority = 'LOWEST'

        def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
            for model in (average_of(runner), inner(runner)):
                seen.append((sum(len(m._forward_pre_hooks) for m in model.modules()), len(model._forward_hooks)))

    hooks = [dict(type='EMAHook', momentum=0.5), JOINT][::order]
    runner = make_runner(case, tiny_model(), [dict(type='Randomise'), *hooks])
    runner.register_hook(Look())
    start = snapshot(inner(runner))
    runner.train()
    assert seen == [(0, 0), (5, 3)]  # the live one: what opens the model's forward, its three layers, what closes it
    average, key = average_of(runner), 'backbone.conv.denoiser.weight'
    assert not torch.equal(average.state_dict()[key], start[key])
    assert [record.has_loss for _, _, record in find_records(average)] == [False]


@pytest.mark.parametrize('hook', [JOINT | dict(tokens=5), LABEL_FREE | dict(tokens=5)])
@pytest.mark.parametrize('ema', [False, True])
def test_resume_continues_identically(case, hook, ema, tmp_path, resumable):
    hooks = [hook, *([dict(type='EMAHook', momentum=0.3)] if ema else [])]

    def run(name, iterations, start, **more):
        runner = make_runner(
            case,
            tiny_model(views=2),
            [*hooks, *start],
            iterations=iterations,
            optim=dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr=0.01), clip_grad=dict(max_norm=1.0)),
            work_dir=str(tmp_path / name),
            default_hooks=dict(checkpoint=dict(type='CheckpointHook', interval=1, by_epoch=False)),
            param_scheduler=dict(type='LinearLR', start_factor=0.1, by_epoch=False, begin=0, end=4),
            **more,
        )
        runner.train()
        assert runner.iter == iterations
        return snapshot(inner(runner)), runner.optim_wrapper.state_dict()

    start = [dict(type='Randomise')]
    weights, optimizer = run('straight', 4, start)
    early, _ = run('parts', 2, start)
    checkpoint = str(tmp_path / 'parts' / 'iter_2.pth')
    resumed_weights, resumed_optimizer = run('parts', 4, [], load_from=checkpoint, resume=True)
    assert_equal(resumed_weights, weights)
    assert all(not torch.equal(early[key], weights[key]) for key in split(weights)[0])
    assert resumed_optimizer['param_groups'] == optimizer['param_groups']
    assert resumed_optimizer['state'].keys() == optimizer['state'].keys() and optimizer['state']
    for index, state in optimizer['state'].items():
        assert_equal(resumed_optimizer['state'][index], state)


@pytest.mark.parametrize(
    'backbone',
    [SWIN | dict(frozen_stages=1), RESNET | dict(frozen_stages=2), RESNET | dict(type='mmdet.ResNet', frozen_stages=1)],
)
@both_modes
def test_frozen_stages(case, backbone, hook):
    """Frozen layers keep their denoisers and have no part in the loss, also where train() is what freezes them."""
    model = features_of(backbone)
    fresh = randomise(MODELS.build(model))
    runner, watch = watched(case, model, hook, size=16)
    layers, before, after = denoised_layers(inner(runner)), snapshot(fresh), snapshot(inner(runner))
    frozen = {name for name, layer in layers.items() if not layer.weight.requires_grad}
    assert frozen and frozen != set(layers)
    for name, layer in layers.items():
        for key, _ in layer.denoiser.named_parameters():
            full = f'{name}.denoiser.{key}'
            assert (full in gradients(runner)) is (name not in frozen)
            assert torch.equal(after[full], before[full]) is (name in frozen)
    inputs = {name: seen for name, seen in watch.inputs[0].items() if name not in frozen}
    expected = expected_loss(fresh, inputs, hook.get('weight', 1))
    torch.testing.assert_close(watch.losses[0]['loss_denoise'], expected, rtol=1e-5, atol=0)


@MODELS.register_module()
class WithHead(FeatureModel):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, *args, **kwargs):
        return {key: loss * self.scale for key, loss in super().forward(*args, **kwargs).items()}


@pytest.mark.parametrize('backbone', [SWIN | dict(frozen_stages=2), RESNET | dict(frozen_stages=4)])
def test_all_frozen(case, backbone):
    """Where the backbone freezes every stage, label-free training is an error; joint training is that of the base."""
    refuse(make_runner(case, features_of(backbone), [LABEL_FREE], size=16), 'all denoisers are frozen')
    runner, watch = watched(case, features_of(backbone, type='WithHead'), JOINT, size=16)
    assert watch.losses[0]['loss_denoise'] == 0
    assert 'all denoisers are frozen' in log_of(runner)


@pytest.mark.parametrize('iterations', [2, SOON + 1])
def test_layer_that_training_does_not_call(case, iterations):
    """A layer that only runs in eval mode keeps its untrained denoiser: a warning names it, once."""
    backbone = denoised(dict(type='TinyBackbone', sometimes=True))
    runner = train(case, tiny_model(backbone), [JOINT], iterations=iterations)
    warnings = [line for line in log_of(runner).splitlines() if 'have not been called in training' in line]
    assert len(warnings) == 1
    assert ' backbone.extra; ' in warnings[0] and 'exclude' in warnings[0]
    assert 'backbone.stem' not in warnings[0]


@MODELS.register_module()
class DroppingBackbone(TinyBackbone):
    """Leaves layers out at random while it trains: one of two branches, and all of them in every third forward."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.branches = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.count = 0

    def forward(self, x):
        if self.training:
            self.count += 1
            if self.count % 3 == 0:
                return (x.new_zeros(len(x), 8, 3, 3) + self.bn2.bias[:, None, None],)
        x = super().forward(x)[0]
        for index, branch in enumerate(self.branches):
            if not self.training or self.count % 2 == index:
                x = x + branch(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return (x,)


@both_modes
def test_layers_that_are_dropped_at_random(case, hook):
    """The loss of an iteration is that of the layers that ran in it, 0 if none did; all layers train."""
    optim = dict(optimizer=dict(type='SGD', lr=0.0))
    runner, watch = watched(case, tiny_model(denoised(dict(type='DroppingBackbone'))), hook, iterations=6, optim=optim)
    ran = [len(inputs) for inputs in watch.inputs]
    assert ran == ([4, 4, 0, 4, 4, 0] if hook is JOINT else [5] * 6)  # label-free, the backbone drops nothing
    for inputs, losses in zip(watch.inputs, watch.losses, strict=True):
        expected = expected_loss(inner(runner), inputs, hook.get('weight', 1)) if inputs else torch.tensor(0.0)
        torch.testing.assert_close(losses['loss_denoise'], expected, rtol=1e-5, atol=0)
    trained = {key for step in range(6) for key, value in gradients(runner, step).items() if value.any()}
    assert trained >= {f'backbone.branches.{i}.denoiser.weight' for i in range(2)}
    assert 'have not been called' not in log_of(runner)


@HOOKS.register_module()
class Unfreeze(Hook):
    def __init__(self, iterations):
        self.iterations = iterations

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        for layer in (inner(runner).backbone.stem, inner(runner).backbone.conv):
            layer.requires_grad_(runner.iter >= self.iterations)


@both_modes
@pytest.mark.parametrize('iterations', [1, 3])
def test_stage_that_is_unfrozen_later(case, hook, iterations):
    runner = train(case, tiny_model(), [hook, dict(type='Unfreeze', iterations=iterations)], iterations=5)
    key = 'backbone.conv.denoiser.weight'
    assert [key in gradients(runner, step) for step in range(5)] == [step >= iterations for step in range(5)]
    assert inner(runner).backbone.conv.denoiser.weight.any()


@MODELS.register_module()
class Denoises(TinyModel):
    def forward(self, inputs, data_samples=None, mode='tensor'):
        losses = super().forward(inputs, data_samples, mode)
        return dict(losses, loss_denoise=losses['loss_cls']) if mode == 'loss' else losses


@MODELS.register_module()
class GoesAround(TinyModel):
    """Computes its losses without forward(mode='loss')."""

    def train_step(self, data, optim_wrapper):
        loss = self.backbone(torch.stack(data['inputs']))[0].square().mean()
        optim_wrapper.update_params(loss)
        return dict(loss=loss)


@pytest.mark.parametrize(
    ('model', 'error', 'words'),
    [
        (tiny_model() | dict(type='Denoises'), ValueError, 'rename'),
        (tiny_model() | dict(type='GoesAround'), RuntimeError, "without calling it with mode='loss'"),
        (tiny_model(dict(type='TinyBackbone')), ValueError, 'found no denoised layer'),
    ],
)
def test_models_that_would_train_no_denoiser_are_refused(case, model, error, words):
    refuse(make_runner(case, model, [JOINT]), words, error)


@MODELS.register_module()
class CallsItself(FeatureModel):
    """Takes its losses of what a call of itself returns, is called with its mode by position, or sums two views."""

    def __init__(self, way, **kwargs):
        super().__init__(**kwargs)
        self.way = way

    def forward(self, inputs, data_samples=None, mode='tensor'):
        images = torch.stack(inputs) if isinstance(inputs, list) else inputs
        if mode != 'loss':
            return self.backbone(images)
        if self.way == 'views' and len(images) > 2:
            views = [self(images[:2], mode='loss'), self(images[2:], mode='loss')]
            return {key: (views[0][key] + views[1][key]) / 2 for key in views[0]}
        features = self(images, mode='tensor') if self.way == 'features' else self.backbone(images)
        return {f'loss_{i}': (x - 0.5).square().mean() for i, x in enumerate(features)}

    def train_step(self, data, optim_wrapper):
        if self.way != 'position':
            return super().train_step(data, optim_wrapper)
        data = self.data_preprocessor(data, True)
        loss, logged = self.parse_losses(self(data['inputs'], None, 'loss'))
        optim_wrapper.update_params(loss)
        return logged


@both_modes
@pytest.mark.parametrize('way', ['features', 'position', 'views'])
def test_a_model_that_calls_itself(case, hook, way):
    """Calls of the model by itself are a part of its forward: the denoisers get the gradients of the plain way."""
    found = []
    for kind in ('', way):
        torch.manual_seed(0)
        model = dict(type='CallsItself', way=kind, backbone=denoised(dict(type='TinyBackbone', norm=False)))
        runner = make_runner(case, model, [hook])
        randomise(inner(runner))
        runner.train()
        found.append(gradients(runner))
        assert torch.is_grad_enabled()
    names = [name for name in found[0] if is_denoiser(name)]
    assert names
    for name in names:
        assert found[0][name].abs().max() > 0
        torch.testing.assert_close(found[1][name], found[0][name])


@HOOKS.register_module()
class Interrupt(Hook):
    priority = 'LOWEST'

    def __init__(self, error, place):
        self.error, self.place = getattr(builtins, error), place

    def before_train(self, runner):
        if self.place == 'start':
            raise self.error
        if self.place == 'forward':
            inner(runner).backbone.conv.register_forward_hook(self.stop)

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if self.place == 'iteration':
            raise self.error

    def stop(self, *_):
        raise self.error


@both_modes
@pytest.mark.parametrize('error', [KeyboardInterrupt, ArithmeticError])
@pytest.mark.parametrize('place', ['iteration', 'forward', 'start'])
def test_interrupted_training_leaves_nothing_behind(case, hook, error, place):
    """However the training ends, no hook listens any more, gradients are on, the guard and the clipping are back."""
    hooks = [hook, dict(type='Interrupt', error=error.__name__, place=place)]
    runner = make_runner(case, tiny_model(), hooks, optim=dict(type='OptimWrapper', clip_grad=dict(max_norm=0.01)))
    with pytest.raises(error):
        runner.train()
    model = inner(runner)
    assert torch.is_grad_enabled()
    assert all(not m._forward_pre_hooks for m in model.modules())
    assert not model._forward_hooks
    assert [record.has_loss for _, _, record in find_records(model)] == [False]
    assert runner.optim_wrapper.clip_func is nn.utils.clip_grad_norm_


@pytest.mark.parametrize(
    ('options', 'names'),
    [
        (dict(mode='both'), "'both'"),
        (dict(mode=None), 'None'),
        (dict(tokens=0), 'tokens of DenoiseLossHook must be a positive number, or None for all, got 0'),
        (dict(weight=0), 'positive, got 0'),
        (dict(weight=-0.1), 'positive, got -0.1'),
        (dict(weight=float('nan')), 'positive, got nan'),
    ],
)
def test_bad_options(options, names):
    with pytest.raises(ValueError, match=names) as error:
        HOOKS.build(dict(type='DenoiseLossHook', **options))
    message(error)


@pytest.mark.parametrize(
    ('clip', 'function'),
    [
        (dict(type='norm', max_norm=LITTLE), nn.utils.clip_grad_norm_),
        (dict(max_norm=LITTLE, norm_type=1), nn.utils.clip_grad_norm_),
        (dict(type='value', clip_value=LITTLE), nn.utils.clip_grad_value_),
    ],
)
def test_clipping_treats_the_base_as_in_the_control(case, clip, function):
    """The base is clipped bitwise as in the vanilla model, and logged so; the denoisers are clipped by themselves."""
    runs = []
    for model, hooks in ((tiny_model(dict(type='TinyBackbone')), []), (tiny_model(), [JOINT])):
        runs.append(make_runner(case, model, hooks, optim=dict(clip_grad=dict(clip))))
        runs[-1].train()
    control, runner = runs
    own, base = split(gradients(runner))
    assert_equal(base, gradients(control))
    assert runner.optim_wrapper.clip_func is function
    together = torch.cat([value.flatten() for value in own.values()])
    assert together.abs().max() > 0
    if 'clip_value' in clip:
        assert together.abs().max() == pytest.approx(LITTLE)
    else:
        order = clip.get('norm_type', 2)
        clipped = torch.cat([value.flatten() for value in base.values()])
        for gradient in (together, clipped):  # torch divides by the norm plus 1e-6
            assert LITTLE / 5 < gradient.norm(order).item() <= LITTLE
        norms = [run.message_hub.get_scalar('train/grad_norm').current() for run in runs]
        assert norms[0] == norms[1] > LITTLE


def test_clipping_in_label_free_mode(case):
    runner = train(case, tiny_model(), [LABEL_FREE], optim=dict(clip_grad=dict(max_norm=LITTLE)))
    together = torch.cat([value.flatten() for value in gradients(runner).values()])
    assert LITTLE / 5 < together.norm().item() <= LITTLE  # torch divides by the norm plus 1e-6
    assert runner.message_hub.get_scalar('train/grad_norm').current() > LITTLE


@MODELS.register_module()
class TwoOptimizers(TinyModel):
    def train_step(self, data, optim_wrapper):
        losses = self._run_forward(self.data_preprocessor(data, True), mode='loss')
        total, logged = self.parse_losses(losses)
        total.backward()
        for wrapper in optim_wrapper.optim_wrappers.values():
            wrapper.step()
            wrapper.zero_grad()
        return logged


def test_several_optimizers(case):
    runner = make_runner(case, tiny_model() | dict(type='TwoOptimizers'), [JOINT])
    model = inner(runner)
    wrappers = {
        name: OptimWrapper(torch.optim.SGD(part.parameters(), lr=0.1), clip_grad=dict(clip) if clip else None)
        for name, part, clip in (('backbone', model.backbone, dict(max_norm=LITTLE)), ('head', model.head, None))
    }
    runner.optim_wrapper = OptimWrapperDict(**wrappers)
    runner.train()
    own = torch.cat([p.flatten() for key, p in model.named_parameters() if is_denoiser(key)])  # they were zero
    assert 0.1 * LITTLE / 5 < own.norm().item() <= 0.1 * LITTLE
    assert wrappers['backbone'].clip_func is nn.utils.clip_grad_norm_


@both_modes
def test_nothing_is_left_behind(case, hook):
    """After training no hook listens, the guard is up again, and the model fuses to a vanilla one."""
    runner = train(case, tiny_model(), [hook])
    model = inner(runner)
    assert all(not m._forward_pre_hooks for m in model.modules())
    assert not model._forward_hooks
    model.train()
    with pytest.raises(RuntimeError, match='DenoiseLossHook'):
        model.backbone(torch.randn(2, 3, 9, 9))[0].sum().backward()
    losses = model([torch.randn(3, 9, 9)] * 2, [torch.tensor(1)] * 2, mode='loss')
    assert set(losses) == {'loss_cls'}
    fused = fuse_model(model)
    vanilla = MODELS.build(tiny_model(dict(type='TinyBackbone')))
    vanilla.load_state_dict(fused.state_dict(), strict=True)
    images = torch.randn(2, 3, 9, 9)
    torch.testing.assert_close(vanilla.eval()(images), model.eval()(images), rtol=1e-4, atol=1e-5)


def test_validation_between_iterations_adds_nothing(case):
    runner, watch = watched(case, tiny_model(), JOINT, by_epoch=True, default_hooks=dict())
    assert [type(output) for output in watch.losses] == ([dict] * 4 + [list] * 4) * 2
    assert all('loss_denoise' in output for output in watch.losses if isinstance(output, dict))
    assert not find_hook(runner, DenoiseLossHook).losses._inputs


def test_hook_on_a_model_converted_without_the_factory(case, monkeypatch):
    """mmengine's own toy model, converted by apply_denoiserep: the hook needs nothing from the factory."""
    data = torch.randn(12, 2, generator=torch.Generator().manual_seed(2))
    monkeypatch.setattr(ToyDataset, 'data', data)
    config = copy.deepcopy(case.iter_based_cfg)
    config.custom_hooks = [LABEL_FREE]
    config.optim_wrapper = dict(optimizer=dict(type='Adam', lr=1e-3))
    config.randomness = dict(seed=1)
    runner = case.build_runner(config)
    schedule = NoiseSchedule(0.02, 0.05, 10)  # strong noise, so that a dozen steps are worth something
    apply_denoiserep(runner.model, 'linear', schedule=schedule, example_input=torch.randn(1, 2))
    before, loss = snapshot(runner.model), runner.model.linear1.denoise_loss(data).item()
    runner.train()
    own, base = split(snapshot(runner.model))
    assert_equal(base, split(before)[1])
    assert own and all(not torch.equal(value, before[key]) for key, value in own.items())
    assert runner.model.linear1.denoise_loss(data).item() < loss - 1e-3
    assert len(runner.message_hub.get_scalar('train/loss_denoise').data[0]) == 12


@both_modes
def test_batchnorm_modes(case, hook):
    """Joint training leaves the modes of all modules alone; label-free has every BatchNorm in eval mode."""
    modes = []

    class Look(Hook):
        priority = 'LOWEST'

        def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
            modes.extend(m.training for m in inner(runner).modules() if isinstance(m, _BatchNorm))

    runner = make_runner(case, tiny_model(), [hook], iterations=2)
    runner.register_hook(Look())
    runner.train()
    assert modes == [hook is JOINT] * 6
