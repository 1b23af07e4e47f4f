"""Calibrates the model of a config on unlabelled images: solves denoisers, gathers moments, fits a domain."""

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
from ..core.calibration.match import FEW, FITS, MANY, RANKED, early_half
from ..core.calibration.solve import denoised_layers
from ..core.files.config_text import vanilla_text
from ..core.files.fused import STAMP
from ..core.method.probe import run_model
from .arguments import at_least, one_of
from .backbones import check_input, denoised_configs, predicting_backbone
from .errors import ConfigError, config_at_fault, config_name, config_path
from .fusion import verify_weights
from .images import SPLITS, Batches, open_images, take_evenly
from .model import build_model, load_strictly, open_model, to_device

LARGE_SHIFT = 0.5
"""A fit that moves a layer's features by more than this share of their variance gives a warning.

On Fashion-MNIST the first layer moves by 0.02 to 0.3 for corruptions such as noise and blur, and by 0.7 to 8 for
inverted images, pure noise and a contrast of 0.3.
"""


@dataclass
class Subject:
    """A model and the images to calibrate it on, from :func:`open_subject`.

    Attributes:
        cfg: The config.
        checkpoint: Path of the checkpoint.
        model: The model, with or without denoisers, in eval mode.
        name: Name of the backbone in the model.
        meta: ``meta`` of the checkpoint.
        weights: Checksum of the backbone's weights before the calibration.
        images: Batches of preprocessed images, (B, C, H, W).
        most: Largest number of images in all processes.
        example: One preprocessed image, (1, C, H, W).
        layers: Layers of the backbone by name, in the order of execution.
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
        """The backbone, which is the part that is calibrated."""
        return self.model.get_submodule(self.name)

    @property
    def total(self) -> int:
        """Number of images in all processes, without those left out so far."""
        return min(self.most, len(self.images.dataset.dataset)) - sum_processes(len(self.images.left_out))

    def choose_every(self, layers: Iterable[str]) -> int:
        """Returns the stride of the sampling for some layers, see :func:`choose_every`."""
        return choose_every(measure_activations(self.backbone, layers, self.example), self.total)


def open_subject(
    cfg: Config,
    checkpoint: str | Path,
    *,
    denoised: bool = False,
    folder: str | Path | None = None,
    split: str = 'train',
    num_images: int = 4000,
    batch_size: int = 32,
    device: str | None = None,
    allow_pickle: bool = False,
) -> Subject:
    """Opens a model and the images to calibrate it on.

    Args:
        cfg: Config of the model.
        checkpoint: Path of its checkpoint.
        denoised: Whether to keep the denoisers, for :func:`solve`; otherwise they are folded into the weights.
        folder: Folder of images; None takes a data set of the config, without augmentation and labels.
        split: Data set of the config: ``'train'``, ``'val'`` or ``'test'``.
        num_images: Largest number of images in all processes.
        batch_size: Largest number of images in a batch.
        device: Device to compute on; None takes the GPU, or the CPU without one.
        allow_pickle: See :func:`mmdenoiserep.core.read_checkpoint`.

    Raises:
        InputError: The checkpoint or the images can't be read or do not fit the config, or the state dict of the
            model leaves out parameters.

    Examples:
        >>> cfg = load_config('configs/demo/vit_fashion-mnist.py')
        >>> torch.save(build_model(cfg).state_dict(), 'vit.pth')
        >>> subject = open_subject(cfg, 'vit.pth', num_images=2, device='cpu')
        >>> subject.example.shape
        torch.Size([1, 1, 28, 28])
    """
    one_of(SPLITS, split=split)
    at_least(1, num_images=num_images, batch_size=batch_size)
    if denoised and not denoised_configs(cfg.get('model')):
        raise ConfigError(
            f'{config_name(cfg)} has no DenoiseRepBackbone, which a schedule needs; '
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
            f'the state dict of the model of {config_name(cfg)} leaves out {lost[0]} and {len(lost) - 1} others '
            '(LoRA?), so their calibration would be lost; merge the adapters into the weights first'
        )
    weights = fingerprint(model.get_submodule(name).state_dict())
    to_device(model, device)
    with config_at_fault(config_path(cfg)):
        images = _open_batches(cfg, model, folder, split, num_images, batch_size)
        example = next(iter(images))[:1]
        check_input(model, name, example)
        backbone = model.get_submodule(name)
        layers = denoised_layers(backbone) if denoised else select_layers(backbone, 'all', example_input=example)
    return Subject(cfg, str(checkpoint), model, name, meta, weights, images, num_images, example, layers)


def _open_batches(
    cfg: Config, model: nn.Module, folder: str | Path | None, split: str, num_images: int, batch_size: int
) -> Batches:
    if not folder and not cfg.get(f'{split}_dataloader'):
        raise ConfigError(f'{config_name(cfg)} has no {split}_dataloader; name a folder of images')
    loader = None if folder else cfg[f'{split}_dataloader']
    workers = loader.get('num_workers', 0) if isinstance(loader, Mapping) else 0
    share = take_evenly(open_images(cfg, split, folder, model), num_images, get_rank(), get_world_size())
    if not len(share):
        raise InputError('there are fewer images than processes')
    return Batches(model, share, batch_size, workers)


def solve(subject: Subject, prior: float = 0.0, every: int | None = None) -> tuple[CalibrationReport, int]:
    """Sets the denoisers of a model to the optimum of their loss, see :func:`mmdenoiserep.solve_denoisers`.

    Args:
        subject: A model with denoisers, and images of the training domain.
        prior: Weight of a prior of equal variances, as a number of images.
        every: Stride of the sampling: takes one in ``every`` tokens or pixels; None chooses it.

    Returns:
        The report; the stride.

    Raises:
        CalibrationError: The images or the features can't be used.

    Examples:
        >>> cfg = load_config('configs/demo/vit_fashion-mnist_denoiserep.py')
        >>> torch.save(build_model(cfg, denoised=False).state_dict(), 'vit.pth')
        >>> report, every = solve(open_subject(cfg, 'vit.pth', denoised=True, device='cpu'))
        >>> report.mode
        'schedule'
    """
    at_least(1, optional=True, every=every)
    every = every or subject.choose_every(subject.layers)
    with with_progress_bar(subject.images, 1) as batches:
        return solve_denoisers(subject.backbone, batches, prior=prior, every=every), every


def gather_source(subject: Subject, every: int | None = None) -> tuple[dict[str, Moments], dict[str, Any]]:
    """Gathers the moments of all layers in the training domain, which :func:`fit` needs.

    Args:
        subject: A model without denoisers, and images of the training domain.
        every: Stride of the sampling: takes one in ``every`` tokens or pixels; None chooses it.

    Returns:
        The moments by layer name; the metadata for :func:`mmdenoiserep.core.save_moments`.

    Raises:
        CalibrationError: The images or the features can't be used.

    Examples:
        >>> cfg = load_config('configs/demo/vit_fashion-mnist.py')
        >>> torch.save(build_model(cfg).state_dict(), 'vit.pth')
        >>> moments, about = gather_source(open_subject(cfg, 'vit.pth', device='cpu'))
        >>> save_moments(moments, 'moments.pth', about)
    """
    at_least(1, optional=True, every=every)
    every = every or subject.choose_every(subject.layers)
    with with_progress_bar(subject.images, 1) as batches:
        moments = collect_moments(subject.backbone, subject.layers, batches, every=every)
    return moments, dict(weights=subject.weights, images=subject.total, every=every)


def load_source(subject: Subject, path: str | Path) -> dict[str, Moments]:
    """Reads the moments of a model in the training domain, by layer name.

    Args:
        subject: The model.
        path: A file of :func:`mmdenoiserep.core.save_moments`.

    Raises:
        CheckpointError: The file can't be read, or its moments were gathered with other weights.
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
    """Returns the options of :func:`fit`: those of :func:`mmdenoiserep.core.safe_fit`, unless given.

    Args:
        subject: The model and the images.
        representative: Whether the images show the classes about as often as the training images.
        part: Layers to fit: ``'first'``, ``'early'`` (half) or ``'all'``.
        fit: Moments to match, see :func:`mmdenoiserep.core.transport`.
        rank: Rank of the maps minus the identity; 0 for full.
        prior: Weight of the training domain as a prior, as a number of images.

    Raises:
        InputError: The part, the fit or the rank is unknown.
    """
    one_of((None, 'first', 'early', 'all'), part=part)
    one_of((None, *FITS), fit=fit)
    at_least(0, optional=True, rank=rank)
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
    """Fits a model to its images, in place, and notes it in ``subject.meta``; see :func:`mmdenoiserep.fit_domain`.

    Args:
        subject: A model without denoisers, and images of the deployment domain.
        source: Moments in the training domain, from :func:`gather_source` or :func:`load_source`.
        options: Options from :func:`choose_fit`.
        every: Stride of the sampling: takes one in ``every`` tokens or pixels; None chooses it.
        memory: GiB for the features of all images. If they fit, all layers are fitted in one pass over the images;
            otherwise each layer has a pass of its own.

    Returns:
        The report; the stride.

    Raises:
        CalibrationError: The images, the features or the source can't be used.

    Examples:
        >>> cfg = load_config('configs/demo/vit_fashion-mnist.py')
        >>> torch.save(build_model(cfg).state_dict(), 'vit.pth')
        >>> source, _ = gather_source(open_subject(cfg, 'vit.pth', split='train', device='cpu'))
        >>> subject = open_subject(cfg, 'vit.pth', split='test', device='cpu')
        >>> report, every = fit(subject, source, choose_fit(subject))
        >>> torch.save(dict(meta=subject.meta, state_dict=subject.model.state_dict()), 'fitted.pth')
    """
    at_least(1, optional=True, every=every)
    if not options.get('layers') or not subject.layers.keys() >= set(options['layers']):
        raise InputError('the options of a fit need names of layers of the model under layers; choose_fit returns some')
    chosen = {name: subject.layers[name] for name in options['layers']}
    sizes = measure_activations(subject.backbone, chosen, subject.example)
    every = every or choose_every(sizes, subject.total)
    how = {key: value for key, value in options.items() if key != 'layers'}
    at_once = fits_memory(sizes, len(subject.images.dataset), memory)
    with with_progress_bar(subject.images, 1 if at_once else len(chosen)) as batches:
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
    """Compares the denoised and the fused model of a subject, see :func:`~.fusion.verify_weights`."""
    state = subject.model.cpu().state_dict()
    return verify_weights(subject.cfg, state, fuse_state_dict(state), subject.checkpoint)


def verify_fit(before: nn.Module, subject: Subject, report: CalibrationReport) -> Verification:
    """Compares a fitted backbone with the original one, in which the maps run as separate layers.

    Args:
        before: A copy of the backbone before the fit.
        subject: The fitted model.
        report: Report of :func:`fit`.

    Raises:
        CheckpointError: The outputs differ, or the weights do not fit the config without denoising.
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
    """Returns warnings about a fit, one sentence each; none for other calibrations.

    Args:
        report: Report of the calibration.
        layers: Names of all layers of the model, in the order of execution.
    """
    if report.mode != 'domain':
        return []
    sentences = []
    count = len(report.layers)
    least = MANY if count > len(early_half(layers)) else FEW
    if count > 1 and report.images < least:
        sentences.append(
            f'{report.images} images are few for {count} layers (from {least} on); take more, or leave the choice '
            'of the layers to this tool'
        )
    first, large = report.layers[0], [layer for layer in report.layers if layer.moved > LARGE_SHIFT]
    if first.moved > LARGE_SHIFT and first.name == layers[0]:
        sentences.append(
            f'{first.name} moves by {first.moved:.2f} times its variance: the images look like another data set '
            'altogether, or like very different light; look at them before you deploy this'
        )
    elif large:
        worst = max(large, key=lambda layer: layer.moved)
        sentences.append(
            f'{len(large)} of {count} layers move by more than {LARGE_SHIFT} times their variance (most: {worst.name}, '
            f'{worst.moved:.2f}); evaluate on a few labelled images before you deploy this'
        )
    return sentences


def check_moved(report: CalibrationReport) -> None:
    """Refuses a fit by default options whose first layer moves far.

    Raises:
        CheckpointError: The first layer moves by more than :data:`LARGE_SHIFT`: the images look like another data set.
    """
    first = report.layers[0]
    if first.moved > LARGE_SHIFT:
        raise CheckpointError(
            f'{first.name} would move by {first.moved:.2f} times its variance, which looks like another data set '
            'or very different light; look at the images, and if they are right, choose the fit with --representative, '
            'or with --layers and --fit'
        )


@dataclass(frozen=True)
class ActivationSize:
    """Size of the input or the output of a layer for one image.

    Attributes:
        channels: Number of channels.
        vectors: Number of vectors (tokens, pixels).
        bytes: Size of the tensor in bytes.
    """

    channels: int
    vectors: int
    bytes: int


def measure_activations(backbone: nn.Module, layers: Iterable[str], image: Tensor) -> list[ActivationSize]:
    """Returns the sizes of the inputs and outputs of some layers for one image, (1, C, H, W)."""
    sizes = []

    def note(layer: nn.Module, args: tuple, output: Tensor) -> None:
        for x in (args[0], output):
            channels = x.shape[-3] if isinstance(layer, nn.Conv2d) else x.shape[-1]
            sizes.append(ActivationSize(channels, x.numel() // channels, x.numel() * x.element_size()))

    handles = [backbone.get_submodule(name).register_forward_hook(note) for name in layers]
    try:
        with evaluating(backbone):
            run_model(backbone, image)
    finally:
        for handle in handles:
            handle.remove()
    return sizes


def choose_every(sizes: Sequence[ActivationSize], images: int) -> int:
    """Returns the stride of the sampling: at most 16, and small enough for ten vectors for each channel."""
    return max(1, min([16, *(images * size.vectors // (10 * size.channels) for size in sizes)]))


def fits_memory(sizes: Sequence[ActivationSize], images: int, gibibytes: float) -> bool:
    """Whether one forward of all images fits into memory; its peak is about four times the largest tensor."""
    return 4 * images * max((size.bytes for size in sizes), default=0) <= gibibytes * 2**30


@contextmanager
def with_progress_bar(images: Batches, passes: int) -> Iterator[Iterable[Tensor]]:
    """Yields the batches with a progress bar over the images of all passes."""
    with tqdm(total=passes * len(images.dataset), unit='image', disable=get_rank() != 0) as bar:
        yield ProgressBatches(images, bar)


class ProgressBatches:
    """Batches that advance a progress bar when they are read."""

    def __init__(self, images: Batches, bar: tqdm) -> None:
        self.images = images
        self.bar = bar

    def __iter__(self) -> Iterator[Tensor]:
        for batch in self.images:
            yield batch
            self.bar.update(len(batch))
        self.bar.update(len(self.images.dataset) - len(self.images.order))  # left out
