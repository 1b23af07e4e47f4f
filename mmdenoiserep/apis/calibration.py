"""Calibrates the model of a config on images: solves its denoisers, gathers its moments, fits it to a domain."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dist import get_rank, get_world_size
from torch import Tensor, nn
from tqdm import tqdm

from ..core import (
    CalibrationReport,
    CheckpointError,
    InputError,
    Moments,
    Verification,
    collect_moments,
    compare_models,
    evaluating,
    explicit_maps,
    fingerprint,
    fit_domain,
    fuse_state_dict,
    load_moments,
    safe_fit,
    select_layers,
    solve_denoisers,
)
from ..core.calibration.collect import sum_processes
from ..core.calibration.match import FEW, MANY, RANKED, early_half
from ..core.calibration.solve import denoised_layers
from ..core.files.config_text import vanilla_text
from ..core.files.fused import STAMP
from ..core.method.probe import run_model
from .backbones import check_input, denoised_configs, predicting_backbone
from .errors import ConfigError, config_at_fault
from .fusion import verify_weights
from .images import Batches, open_images, spread
from .model import build_model, load_strictly, open_model, to_device

LARGE = 0.5
"""How far a layer's features may move without a warning, as a share of their variance.

On Fashion-MNIST the first layer moves by 0.02 to 0.3 for noise, blur and the like, and by 0.7 to 8 for inverted images,
mere noise and a contrast lowered to 0.3.
"""


@dataclass
class Subject:
    """A model with its weights, and the images to calibrate it on; :func:`open_subject` makes it.

    Attributes:
        cfg: The config.
        checkpoint: Path of the weights.
        model: The model, with denoisers or without, in eval mode.
        name: Name of the backbone in it.
        meta: ``meta`` of the checkpoint.
        weights: Checksum of the backbone's weights before anything was done to it.
        images: Batches as the data preprocessor gives them, (B, C, H, W).
        most: Images of all processes, at most.
        example: One image, (1, C, H, W).
        layers: The layers of the backbone by name, first executed first.
    """

    cfg: Config
    checkpoint: str
    model: nn.Module
    name: str
    meta: dict[str, Any]
    weights: str
    images: Batches
    most: int
    example: Tensor
    layers: Mapping[str, Any]

    @property
    def backbone(self) -> nn.Module:
        """The part that is calibrated."""
        return self.model.get_submodule(self.name)

    @property
    def total(self) -> int:
        """Number of images of all processes, less those that were left out so far."""
        return min(self.most, len(self.images.dataset.dataset)) - sum_processes(len(self.images.left_out))

    def choose_every(self, layers: Iterable[str]) -> int:
        """Returns which share of the vectors of some layers is enough, see :func:`choose_every`."""
        return choose_every(measure_flows(self.backbone, layers, self.example), self.total)


def open_subject(
    cfg: Config,
    checkpoint: str,
    *,
    denoised: bool = False,
    folder: Path | None = None,
    split: str = 'train',
    num_images: int = 4000,
    batch_size: int = 32,
    device: str | None = None,
    allow_pickle: bool = False,
) -> Subject:
    """Opens a model and the images to calibrate it on.

    Args:
        cfg: The config.
        checkpoint: Path of its weights.
        denoised: Keeps the denoisers, to solve for them; otherwise they are folded into the weights.
        folder: Folder of images; None takes a data set of the config, without augmentation and labels.
        split: The data set: ``'train'``, ``'val'`` or ``'test'``.
        num_images: Images at most, in all processes.
        batch_size: Images at a time.
        device: Where to compute; None takes a GPU where there is one.
        allow_pickle: See :func:`mmdenoiserep.core.read_checkpoint`.

    Raises:
        InputError: A file or the images can't be read, or do not fit the config, or a fit could not be saved.
    """
    if denoised and not denoised_configs(cfg.get('model')):
        raise ConfigError(
            f'{cfg.filename} has no DenoiseRepBackbone, which a schedule needs; '
            'wrap the backbone as docs/own-model.md shows'
        )
    denoisers = 'keep' if denoised else 'fold'
    model, meta = open_model(cfg, checkpoint, denoisers=denoisers, allow_pickle=allow_pickle)
    if denoised and STAMP in meta:
        raise CheckpointError(
            f'{checkpoint} is fused already; take the vanilla checkpoint that its training began with'
        )
    name = predicting_backbone(model)
    saved = model.state_dict()
    if lost := [key for key, _ in model.named_parameters() if key not in saved]:
        raise InputError(
            f'a state dict of the model of {cfg.filename} leaves out {lost[0]} and {len(lost) - 1} others (LoRA?), '
            'so what is fitted to them would be lost; merge the adapters into the weights first'
        )
    weights = fingerprint(model.get_submodule(name).state_dict())
    to_device(model, device)
    with config_at_fault(cfg.filename):
        images = _open_batches(cfg, model, folder, split, num_images, batch_size)
        example = next(iter(images))[:1]
        check_input(model, name, example)
        backbone = model.get_submodule(name)
        layers = denoised_layers(backbone) if denoised else select_layers(backbone, 'all', example_input=example)
    return Subject(cfg, str(checkpoint), model, name, meta, weights, images, num_images, example, layers)


def _open_batches(
    cfg: Config, model: nn.Module, folder: Path | None, split: str, num_images: int, batch_size: int
) -> Batches:
    if not folder and not cfg.get(f'{split}_dataloader'):
        raise ConfigError(f'{cfg.filename} has no {split}_dataloader; name a folder with --images')
    loader = None if folder else cfg[f'{split}_dataloader']
    workers = loader.get('num_workers', 0) if isinstance(loader, Mapping) else 0
    share = spread(open_images(cfg, split, folder, model), num_images, get_rank(), get_world_size())
    if not len(share):
        raise InputError('there are fewer images than processes')
    return Batches(model, share, batch_size, workers)


def solve(subject: Subject, prior: float = 0.0, every: int | None = None) -> tuple[CalibrationReport, int]:
    """Sets the denoisers of a model to the optimum of their loss, see :func:`mmdenoiserep.solve_denoisers`.

    Args:
        subject: A model with denoisers.
        prior: Images that a prior of equal variances is worth.
        every: One in so many tokens or pixels is taken; None chooses.

    Returns:
        What was done; ``every``.

    Raises:
        CalibrationError: The images or the features can't be used.
    """
    every = every or subject.choose_every(subject.layers)
    with counted(subject.images, 1) as batches:
        return solve_denoisers(subject.backbone, batches, prior=prior, every=every), every


def gather_source(subject: Subject, every: int | None = None) -> tuple[dict[str, Moments], dict[str, Any]]:
    """Gathers the moments of all layers, which a later fit takes as those of the training domain.

    Args:
        subject: A model without denoisers, and images of the training domain.
        every: One in so many tokens or pixels is taken; None chooses.

    Returns:
        The moments by layer name; what a file of them says about them.

    Raises:
        CalibrationError: The images or the features can't be used.
    """
    every = every or subject.choose_every(subject.layers)
    with counted(subject.images, 1) as batches:
        moments = collect_moments(subject.backbone, subject.layers, batches, every=every)
    return moments, dict(weights=subject.weights, images=subject.total, every=every)


def load_source(subject: Subject, path: str | Path) -> dict[str, Moments]:
    """Reads the moments of a training domain for a model.

    Raises:
        CheckpointError: The file can't be read, or was gathered with other weights.
    """
    source, about = load_moments(path)
    if about.get('weights') != subject.weights:
        raise CheckpointError(f'{path} was gathered with other weights than {subject.checkpoint}; gather it again')
    return source


def choose_fit(
    subject: Subject,
    *,
    representative: bool = False,
    part: str | None = None,
    fit: str | None = None,
    rank: int | None = None,
    prior: float | None = None,
) -> dict[str, Any]:
    """Returns the options of a fit: what :func:`mmdenoiserep.core.safe_fit` finds, but for what is asked for.

    Args:
        subject: The model and the images.
        representative: Whether the images show the classes about as often as the training images did.
        part: Layers: ``'first'``, ``'early'`` (half) or ``'all'``.
        fit: See :func:`mmdenoiserep.core.transport`.
        rank: Rank of the maps less the identity, 0 for full.
        prior: Images that the source is worth.
    """
    names = list(subject.layers)
    options = safe_fit(names, subject.total, representative)
    if part:
        options['layers'] = tuple(dict(first=names[:1], early=early_half(names), all=names)[part])
    options |= {key: value for key, value in dict(fit=fit, prior=prior).items() if value is not None}
    if rank is not None:
        options['rank'] = rank or None
    if options['fit'] not in RANKED:
        options['rank'] = None
    return options


def fit(
    subject: Subject,
    source: Mapping[str, Moments],
    options: Mapping[str, Any],
    every: int | None = None,
    memory: float = 4.0,
) -> tuple[CalibrationReport, int]:
    """Fits a model to its images, in place, see :func:`mmdenoiserep.fit_domain`; its ``meta`` says so afterwards.

    Args:
        subject: A model without denoisers, and images of the place where it will run.
        source: Moments in the training domain, of :func:`load_source`.
        options: What :func:`choose_fit` returned.
        every: One in so many tokens or pixels is taken; None chooses.
        memory: GiB that the features of all images may take; where it is enough, all layers are fitted in one pass.

    Returns:
        What was done; ``every``.

    Raises:
        CalibrationError: The images, the features or the source can't be used.
    """
    chosen = {name: subject.layers[name] for name in options['layers']}
    flows = measure_flows(subject.backbone, chosen, subject.example)
    every = every or choose_every(flows, subject.total)
    how = {key: value for key, value in options.items() if key != 'layers'}
    at_once = fits_memory(flows, len(subject.images.dataset), memory)
    with counted(subject.images, 1 if at_once else len(chosen)) as batches:
        if at_once:
            batches = list(batches)
            if len({batch.shape[1:] for batch in batches}) == 1:
                batches = [torch.cat(batches)]
        report = fit_domain(subject.backbone, chosen, batches, source, every=every, **how)
    subject.meta[STAMP] = dict(fused=True, layers=len(report.layers), mode='domain', images=report.images, **how)
    if 'cfg' not in subject.meta:  # for the libraries' inferencers
        subject.meta['cfg'] = vanilla_text(subject.cfg.pretty_text)
    return report, every


def verify_schedule(subject: Subject) -> dict[str, Verification]:
    """Folds the denoisers of a model and compares, see :func:`~.fusion.verify_weights`."""
    state = subject.model.cpu().state_dict()
    return verify_weights(subject.cfg, state, fuse_state_dict(state), subject.checkpoint)


def verify_fit(before: nn.Module, subject: Subject, report: CalibrationReport) -> Verification:
    """Compares a fitted backbone with the one before, in which the maps run as layers of their own.

    Args:
        before: A copy of the backbone as it was.
        subject: The fitted model.
        report: What :func:`fit` returned.

    Raises:
        CheckpointError: They differ, or the config without denoising does not take the weights.
    """
    images = torch.cat([subject.example, torch.randn_like(subject.example)])
    with explicit_maps(before, {layer.name: (layer.linear, layer.constant) for layer in report.layers}):
        result = compare_models(before, subject.backbone, images)
    if not result.ok:
        raise CheckpointError(
            f'{subject.checkpoint}: the maps do not fold into the weights ({result.worst}); nothing was written'
        )
    load_strictly(build_model(subject.cfg, False), subject.model.state_dict(), subject.checkpoint, 'vanilla')
    return result


def warnings_of(report: CalibrationReport, layers: Sequence[str]) -> list[str]:
    """Returns what the user of a fit should know, one sentence each.

    Args:
        report: What was done.
        layers: Names of all layers of the model, first executed first.
    """
    if report.mode != 'domain':
        return []
    sentences = []
    count = len(report.layers)
    least = MANY if count > len(early_half(layers)) else FEW
    if count > 1 and report.images < least:
        sentences.append(
            f'{report.images} images are few for {count} layers (from {least} on); gather more, or leave the choice '
            'of the layers to this tool'
        )
    first, large = report.layers[0], [layer for layer in report.layers if layer.moved > LARGE]
    if first.moved > LARGE and first.name == layers[0]:
        sentences.append(
            f'{first.name} moves by {first.moved:.2f} times its variance: the images look like another data set '
            'altogether, or like very different light; look at them before you deploy this'
        )
    elif large:
        worst = max(large, key=lambda layer: layer.moved)
        sentences.append(
            f'{len(large)} of {count} layers move by more than {LARGE} times their variance (most: {worst.name}, '
            f'{worst.moved:.2f}); evaluate on a few labelled images before you deploy this'
        )
    return sentences


def check_moved(report: CalibrationReport) -> None:
    """Refuses a fit that nobody chose, and whose first layer moves far.

    Raises:
        CheckpointError: The images look like another data set.
    """
    first = report.layers[0]
    if first.moved > LARGE:
        raise CheckpointError(
            f'{first.name} would move by {first.moved:.2f} times its variance, which looks like another data set '
            'or very different light; look at the images, and if they are right, say what may change with '
            '--representative, or with --layers and --fit'
        )


@dataclass(frozen=True)
class Flow:
    """What one image sends through a layer, in or out.

    Attributes:
        channels: C.
        vectors: Number of its vectors (tokens, pixels).
        bytes: Their size.
    """

    channels: int
    vectors: int
    bytes: int


def measure_flows(backbone: nn.Module, layers: Iterable[str], image: Tensor) -> list[Flow]:
    """Returns what an image, (1, C, H, W), sends into and out of some layers."""
    flows = []

    def note(layer: nn.Module, args: tuple, output: Tensor) -> None:
        for x in (args[0], output):
            channels = x.shape[-3] if isinstance(layer, nn.Conv2d) else x.shape[-1]
            flows.append(Flow(channels, x.numel() // channels, x.numel() * x.element_size()))

    handles = [backbone.get_submodule(name).register_forward_hook(note) for name in layers]
    try:
        with evaluating(backbone):
            run_model(backbone, image)
    finally:
        for handle in handles:
            handle.remove()
    return flows


def choose_every(flows: Sequence[Flow], images: int) -> int:
    """Returns which share of the vectors is enough: one in so many, at most 16, but ten for each channel."""
    return max(1, min([16, *(images * flow.vectors // (10 * flow.channels) for flow in flows)]))


def fits_memory(flows: Sequence[Flow], images: int, gibibytes: float) -> bool:
    """Whether a forward of all images at once takes about so much: at its peak, four times the largest flow."""
    return 4 * images * max((flow.bytes for flow in flows), default=0) <= gibibytes * 2**30


@contextmanager
def counted(images: Batches, passes: int) -> Iterator[Iterable[Tensor]]:
    """Gives the batches with a progress bar over the images of all passes."""
    with tqdm(total=passes * len(images.dataset), unit='image', disable=get_rank() != 0) as bar:
        yield CountedBatches(images, bar)


class CountedBatches:
    """Batches that move a bar whenever they are read."""

    def __init__(self, images: Batches, bar: tqdm) -> None:
        self.images = images
        self.bar = bar

    def __iter__(self) -> Iterator[Tensor]:
        for batch in self.images:
            yield batch
            self.bar.update(len(batch))
        self.bar.update(len(self.images.dataset) - len(self.images.order))  # left out
