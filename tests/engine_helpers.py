"""Tiny models, data and runners for the tests of mmdenoiserep.engine."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.model import BaseModel, BaseModule
from mmengine.optim import OptimWrapper
from mmengine.registry import DATASETS, HOOKS, METRICS, MODELS, OPTIM_WRAPPERS
from mmengine.runner import Runner
from mmengine.testing import RunnerTestCase
from torch import Tensor, nn
from torch.utils.data import Dataset

import mmdenoiserep  # noqa: F401
from helpers import copied, randomise

# what mmdet's and mmseg's SwinTransformer take
TINY_SWIN = dict(embed_dims=12, depths=(1, 1), num_heads=(1, 2), strides=(4, 2), out_indices=(0, 1), window_size=4)


@MODELS.register_module()
class TinyBackbone(BaseModule):
    """Convolutions and a Linear layer in two places; with ``sometimes`` one more layer that runs in eval mode only."""

    def __init__(self, norm=True, sometimes=False, init_cfg=None):
        super().__init__(init_cfg)
        self.stem = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(6) if norm else nn.Identity()
        self.conv = nn.Conv2d(6, 8, 3, stride=2, groups=2)
        self.bn2 = nn.BatchNorm2d(8) if norm else nn.Identity()
        self.shared = nn.Linear(8, 8)
        self.again = self.shared
        self.extra = nn.Linear(8, 8) if sometimes else None

    def forward(self, x):
        x = F.gelu(self.bn1(self.stem(x)))
        x = F.gelu(self.bn2(self.conv(x))).permute(0, 2, 3, 1)
        x = torch.tanh(self.shared(x))
        x = x + self.again(2 * x)
        if self.extra is not None and not self.training:
            x = x + self.extra(x)
        return (x.permute(0, 3, 1, 2),)


@MODELS.register_module()
class TinyModel(BaseModel):
    """A classifier whose losses are means over the batch; it calls its backbone on views of different sizes."""

    def __init__(self, backbone, norm=True, views=1, data_preprocessor=None):
        super().__init__(data_preprocessor)
        self.backbone = MODELS.build(backbone)
        self.norm = nn.BatchNorm1d(8) if norm else nn.Identity()
        self.head = nn.Linear(8, 4)
        self.views = views

    def forward(self, inputs, data_samples=None, mode='tensor'):
        images = torch.stack(inputs) if isinstance(inputs, list) else inputs
        logits = self.head(self.norm(self.backbone(images)[0].mean((2, 3))))
        if mode != 'loss':
            return logits if mode == 'tensor' else list(logits)
        labels = torch.stack(data_samples) if isinstance(data_samples, list) else data_samples
        losses = dict(loss_cls=F.cross_entropy(logits.float(), labels))
        for view in range(1, self.views):
            losses[f'loss_view{view}'] = self.backbone(images[..., view:])[0].square().mean()
        return losses


@MODELS.register_module()
class FeatureModel(BaseModel):
    """Trains any backbone on the size of its features, unlike any label but with gradients everywhere."""

    def __init__(self, backbone, data_preprocessor=None):
        super().__init__(data_preprocessor)
        self.backbone = MODELS.build(backbone)

    def forward(self, inputs, data_samples=None, mode='tensor'):
        features = self.backbone(torch.stack(inputs) if isinstance(inputs, list) else inputs)
        if mode != 'loss':
            return features
        return {f'loss_{i}': (x - 0.5).square().mean() for i, x in enumerate(features)}


@DATASETS.register_module()
class TinyDataset(Dataset):
    metainfo = dict()

    def __init__(self, size=9):
        generator = torch.Generator().manual_seed(5)
        self.images = torch.randn(16, 3, size, size, generator=generator) + 0.5
        self.labels = torch.randint(4, (16,), generator=generator)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return dict(inputs=self.images[index], data_samples=self.labels[index])


@METRICS.register_module()
class CountingMetric(BaseMetric):
    """Gives one number a validation from each list, so that a test decides which checkpoint is the best."""

    def __init__(self, **scores):
        super().__init__()
        self.scores = {key: list(values) for key, values in scores.items()}

    def process(self, data_batch, data_samples):
        self.results.append(0)

    def compute_metrics(self, results):
        return {key: values.pop(0) for key, values in self.scores.items()}


@OPTIM_WRAPPERS.register_module()
class RecordingWrapper(OptimWrapper):
    """Keeps the gradients that every step of the optimizer sees, after clipping."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.gradients: list[dict[int, Tensor]] = []

    def step(self, **kwargs):
        if self.clip_grad_kwargs:
            self._clip_grad()
        parameters = [p for group in self.optimizer.param_groups for p in group['params']]
        self.gradients.append({id(p): p.grad.clone() for p in parameters if p.grad is not None})
        self.optimizer.step(**kwargs)


@OPTIM_WRAPPERS.register_module()
class AutocastWrapper(RecordingWrapper):
    """bf16 autocast on the CPU, where mmengine's AmpOptimWrapper asserts a GPU."""

    def optim_context(self, model):
        return torch.autocast('cpu', torch.bfloat16)


@HOOKS.register_module()
class Randomise(Hook):
    """Gives the live model random denoisers and BatchNorm statistics after its weights were initialised or loaded."""

    priority = 'VERY_HIGH'

    def before_train(self, runner):
        randomise(runner.model)


def denoised(backbone: dict | None = None, **options) -> dict:
    options = {'image_size': 9, **options}
    return dict(type='DenoiseRepBackbone', backbone=backbone or dict(type='TinyBackbone'), **options)


def tiny_model(backbone: dict | None = None, **options) -> dict:
    """Config of a TinyModel, denoised unless the backbone says otherwise."""
    return dict(type='TinyModel', backbone=backbone or denoised(), **options)


def make_runner(
    case: RunnerTestCase,
    model: dict,
    hooks: list = (),
    by_epoch: bool = False,
    size: int = 9,
    iterations: int = 1,
    optim: dict | None = None,
    **changes,
) -> Runner:
    """Builds a runner of RunnerTestCase's config with the tiny data, seeded, in order, four images an iteration.

    Args:
        optim: Changes of the OptimWrapper, which records gradients.
        changes: Other settings of the config.
    """
    config = copy.deepcopy(case.epoch_based_cfg if by_epoch else case.iter_based_cfg)
    config.model = model
    for part in ('train', 'val', 'test'):
        config[f'{part}_dataloader'].dataset = dict(type='TinyDataset', size=size)
        config[f'{part}_dataloader'].batch_size = 4
    config.train_dataloader.sampler.shuffle = False
    optim = dict(optimizer=dict(type='SGD', lr=0.1, momentum=0.9)) | (optim or {})
    config.optim_wrapper = dict(type='RecordingWrapper') | optim
    if not by_epoch:
        config.train_cfg = dict(by_epoch=False, max_iters=iterations)
        config.default_hooks.checkpoint = dict(type='CheckpointHook', interval=-1, save_last=False)
        for part in ('val', 'test'):
            config[f'{part}_dataloader'] = config[f'{part}_evaluator'] = config[f'{part}_cfg'] = None
    config.custom_hooks = list(hooks)
    config.randomness = dict(seed=7)
    for key, value in changes.items():
        config[key] = value
    return case.build_runner(config)


def train(case: RunnerTestCase, model: dict, hooks: list = (), **changes) -> Runner:
    """Runs the training of :func:`make_runner`, on randomised denoisers and statistics, and returns its runner."""
    runner = make_runner(case, model, [dict(type='Randomise'), *hooks], **changes)
    runner.train()
    return runner


def refuse(runner: Runner, words: str, error: type[Exception] = ValueError) -> None:
    """Asserts that a run ends before its first iteration, with one line that holds these words."""
    with pytest.raises(error) as caught:
        runner.train()
    assert words in message(caught)
    assert runner.iter == 0


def inner(runner: Runner) -> nn.Module:
    return getattr(runner.model, 'module', runner.model)


def gradients(runner: Runner, step: int = 0) -> dict[str, Tensor]:
    """Returns the gradients of one step of the optimizer by parameter name."""
    recorded = runner.optim_wrapper.gradients[step]
    return {name: recorded[id(p)] for name, p in inner(runner).named_parameters() if id(p) in recorded}


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """Returns a copy of the state dict."""
    return copied(model.state_dict())


def log_of(runner: Runner) -> str:
    return Path(runner._log_dir, f'{runner.timestamp}.log').read_text()


def average_of(runner: Runner) -> nn.Module:
    """Returns the averaged model of an EMAHook."""
    return next(hook for hook in runner.hooks if hasattr(hook, 'ema_model')).ema_model.module


def is_denoiser(name: str) -> bool:
    return '.denoiser.' in name


def split(values: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Returns the entries of the denoisers and those of the base."""
    own = {key: value for key, value in values.items() if is_denoiser(key)}
    return own, {key: value for key, value in values.items() if key not in own}


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor], **tolerance) -> None:
    """Asserts the same, non-empty keys and the same values: bitwise, or within rtol and atol."""
    assert actual and actual.keys() == expected.keys()
    tolerance = {'rtol': 0, 'atol': 0, **tolerance}
    for key in expected:
        torch.testing.assert_close(actual[key], expected[key], msg=lambda text, key=key: f'{key}: {text}', **tolerance)


def message(error: pytest.ExceptionInfo) -> str:
    """Returns the text of an error and asserts that it is one line."""
    text = str(error.value.args[0])
    assert text and '\n' not in text
    return text


def files(folder: str | Path) -> set[str]:
    """Returns the names of the checkpoints in a folder."""
    return {path.name for path in Path(folder).glob('*.pth')}


@contextmanager
def runner_case() -> Iterator[RunnerTestCase]:
    """mmengine's own test case: a work folder, configs of runners, and clean global state afterwards."""
    case = RunnerTestCase()
    case.setUp()
    try:
        yield case
    finally:
        case.tearDown()
