"""Calibrates the model of a config on unlabelled images: solves denoisers, gathers moments, fits a domain."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

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
    select_layers,
    solve_denoisers,
)
from ..core.calibration.collect import Stride, sum_processes
from ..core.calibration.features import Features
from ..core.calibration.memory import paused_bytes
from ..core.calibration.moments import gather_processes
from ..core.calibration.solve import denoised_layers
from ..core.files.config_text import vanilla_text
from ..core.files.fused import STAMP
from ..core.method.probe import run_model
from ..core.utils.intercept import intercepting
from .arguments import at_least, one_of
from .backbones import check_input, denoised_configs, predicting_backbone
from .distances import DISTANCES, measure_distances
from .errors import ConfigError, config_at_fault, config_name, config_path
from .fusion import verify_weights
from .images import SPLITS, Batches, describe_preprocessing, open_images, take_spread
from .model import build_model, load_strictly, open_model, to_device

LARGE_SHIFT = 0.5
"""A fit that moves a layer's features by more than this share of their variance gives a warning.

On Fashion-MNIST the first layer moves by 0.02 to 0.3 for corruptions such as noise and blur, and by 0.7 to 8 for
inverted images, pure noise and a contrast of 0.3.
"""


SOME = 200
"""Number of images of which the distances are measured, of the training domain and of those fitted to."""


@dataclass
class Subject:
    """A model and the images to calibrate it on, from :func:`open_subject`.

    Attributes:
        cfg: The config.
        checkpoint: Path of the checkpoint.
        model: The model, with or without denoisers, in eval mode.
        part: What is calibrated: the backbone, or :class:`Extractor`, the backbone with the neck.
        meta: ``meta`` of the checkpoint.
        about: What a file of moments has to agree on: checksum of the weights, and how images become inputs.
        images: Batches of preprocessed images, (B, C, H, W).
        example: One preprocessed image, (1, C, H, W).
        layers: Layers of the part by name, in the order of execution.
    """

    cfg: Config
    checkpoint: str
    model: nn.Module
    part: nn.Module
    meta: dict[str, Any]
    about: dict[str, Any]
    images: Batches
    example: Tensor
    layers: Mapping[str, Any]

    @property
    def total(self) -> int:
        """Number of images in all processes, without those left out so far."""
        return sum_processes(len(self.images.dataset) - len(self.images.left_out))

    def some_images(self) -> Batches:
        """Returns batches of at most :data:`SOME` images in this process, spread over all."""
        some = copy(self.images)
        some.take(SOME)
        return some

    def choose_strides(self, inputs: bool = False) -> dict[str, int]:
        """Returns the stride of the sampling for each layer, see :func:`choose_strides`."""
        return choose_strides(measure_vectors(self.part, self.layers, self.example, inputs), self.total)


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
    part = model.get_submodule(name) if denoised else Extractor.of(model, name)
    to_device(model, device)
    with config_at_fault(config_path(cfg)):
        about = dict(weights=fingerprint(part.state_dict()), preprocessing=describe_preprocessing(cfg, model))
        images = _open_batches(cfg, model, folder, split, num_images, batch_size)
        example = next(iter(images))[:1]
        check_input(model, name, example)
        layers = denoised_layers(part) if denoised else select_layers(part, 'all', example_input=example)
    return Subject(cfg, str(checkpoint), model, part, meta, about, images, example, layers)


def _open_batches(
    cfg: Config, model: nn.Module, folder: str | Path | None, split: str, num_images: int, batch_size: int
) -> Batches:
    if not folder and not cfg.get(f'{split}_dataloader'):
        raise ConfigError(f'{config_name(cfg)} has no {split}_dataloader; name a folder of images')
    loader = None if folder else cfg[f'{split}_dataloader']
    workers = loader.get('num_workers', 0) if isinstance(loader, Mapping) else 0
    share = take_spread(open_images(cfg, split, folder, model), num_images, get_rank(), get_world_size())
    if not len(share):
        raise InputError('there are fewer images than processes')
    return Batches(model, share, batch_size, workers)


def solve(
    subject: Subject, prior: float = 0.0, stride: int | None = None, spectra: bool = False
) -> tuple[CalibrationReport, str]:
    """Sets the denoisers of a model to the optimum of their loss, see :func:`mmdenoiserep.solve_denoisers`.

    Args:
        subject: A model with denoisers, and images of the training domain.
        prior: Weight of a prior of equal variances, as a number of images.
        stride: Takes one in so many tokens or pixels of all layers; None chooses for each layer.
        spectra: Whether the report has the spectra of all layers.

    Returns:
        The report; the strides, as a text.

    Raises:
        CalibrationError: The images or the features can't be used.

    Examples:
        >>> cfg = load_config('configs/demo/vit_fashion-mnist_denoiserep.py')
        >>> torch.save(build_model(cfg, denoised=False).state_dict(), 'vit.pth')
        >>> report, strides = solve(open_subject(cfg, 'vit.pth', denoised=True, device='cpu'))
        >>> report.mode
        'schedule'
    """
    at_least(1, optional=True, stride=stride)
    strides = stride or subject.choose_strides(inputs=True)
    with with_progress_bar(subject.images) as batches:
        report = solve_denoisers(subject.part, batches, prior=prior, stride=strides, spectra=spectra)
    return report, describe_strides(strides)


def gather_source(subject: Subject, stride: int | None = None) -> tuple[dict[str, Moments], dict[str, Any]]:
    """Gathers the moments of all layers in the training domain, which :func:`fit` needs.

    Args:
        subject: A model without denoisers, and images of the training domain.
        stride: Takes one in so many tokens or pixels of all layers; None chooses for each layer.

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
    at_least(1, optional=True, stride=stride)
    strides = stride or subject.choose_strides()
    with with_progress_bar(subject.images) as batches:
        moments = collect_moments(subject.part, subject.layers, batches, stride=strides)
    about = dict(subject.about, images=subject.total, strides=describe_strides(strides))
    distances = measure_distances(subject.part, subject.layers, subject.some_images(), moments)
    return moments, about | {DISTANCES: distances._asdict()}


def load_source(subject: Subject, path: str | Path) -> tuple[Mapping[str, Moments], dict[str, Any]]:
    """Reads the moments of a model in the training domain, by layer name, and their metadata.

    Args:
        subject: The model.
        path: A file of :func:`mmdenoiserep.core.save_moments`.

    Raises:
        CheckpointError: The file can't be read, or its moments were gathered with other weights, or of images that
            became inputs in another way.
    """
    source, about = load_moments(path)
    if about.get('weights') != subject.about['weights']:
        raise CheckpointError(f'{path} was gathered with other weights than {subject.checkpoint}; gather it again')
    there, here = about.get('preprocessing', {}), subject.about['preprocessing']
    for key in sorted(there.keys() & here.keys()):
        if there[key] != here[key]:
            raise CheckpointError(
                f'{path} was gathered with another {key} than the config has ({there[key]}, not {here[key]}); '
                'gather it again with this config'
            )
    return source, about


def fit(
    subject: Subject,
    source: Mapping[str, Moments],
    *,
    stride: int | None = None,
    memory: float = 4.0,
    spectra: bool = False,
    maps: bool = False,
    progress: Callable[[str], Any] | None = None,
) -> tuple[CalibrationReport, str]:
    """Fits a model to its images, in place, and notes it in ``subject.meta``; see :func:`mmdenoiserep.fit_domain`.

    A fit holds what the forwards of all images keep at one place of the model. If that is more than ``memory``, it
    takes some of the images, and prints a sentence.

    Args:
        subject: A model without denoisers, and images of the deployment domain.
        source: Moments in the training domain, from :func:`gather_source` or :func:`load_source`.
        stride: Takes one in so many tokens or pixels of all layers; None chooses for each layer.
        memory: GiB in each process for the images and features of the forwards.
        spectra: Whether the report has the spectra of all layers.
        maps: Whether the report has the maps of all layers, which :func:`verify_fit` needs.
        progress: Called with the name of each layer when it is done.

    Returns:
        The report; the strides, as a text.

    Raises:
        CalibrationError: The images, the features or the source can't be used.

    Examples:
        >>> cfg = load_config('configs/demo/vit_fashion-mnist.py')
        >>> torch.save(build_model(cfg).state_dict(), 'vit.pth')
        >>> source, _ = gather_source(open_subject(cfg, 'vit.pth', split='train', device='cpu'))
        >>> subject = open_subject(cfg, 'vit.pth', split='test', device='cpu')
        >>> report, strides = fit(subject, source)
        >>> torch.save(dict(meta=subject.meta, state_dict=subject.model.state_dict()), 'fitted.pth')
    """
    at_least(1, optional=True, stride=stride)
    limit_images(subject, memory, stride or subject.choose_strides())
    strides = stride or subject.choose_strides()
    with with_progress_bar(subject.images) as batches, layer_bar(len(subject.layers)) as move:

        def done(name: str) -> None:
            move(name)
            if progress:
                progress(name)

        report = fit_domain(
            subject.part, subject.layers, batches, source, stride=strides, spectra=spectra, maps=maps, progress=done
        )
    subject.meta[STAMP] = dict(fused=True, layers=len(report.layers), mode='domain', images=report.images)
    if 'cfg' not in subject.meta:  # for the libraries' inferencers
        subject.meta['cfg'] = vanilla_text(subject.cfg.pretty_text)
    return report, describe_strides(strides)


def verify_schedule(subject: Subject) -> dict[str, Verification]:
    """Compares the denoised and the fused model of a subject, see :func:`~.fusion.verify_weights`."""
    state = subject.model.cpu().state_dict()
    return verify_weights(subject.cfg, state, fuse_state_dict(state), subject.checkpoint)


def verify_fit(before: nn.Module, subject: Subject, report: CalibrationReport) -> Verification:
    """Compares what was fitted with the original, in which the maps run as separate layers.

    Args:
        before: A copy of ``subject.part`` before the fit.
        subject: The fitted model.
        report: Report of :func:`fit`, with maps.

    Raises:
        CheckpointError: The outputs differ, or the weights do not fit the config without denoising.
    """
    images = torch.cat([subject.example, torch.randn_like(subject.example)])
    with explicit_maps(before, {layer.name: (layer.linear, layer.constant) for layer in report.layers}):
        result = compare_models(before, subject.part, images)
    if not result.ok:
        why = f'the maps do not fold into the weights ({result.worst})'
        most = max(report.layers, key=lambda layer: layer.moved)
        if most.moved > LARGE_SHIFT:
            why += f'; {most.name} moves by {most.moved:.1e} times its variance, which amplifies rounding: '
            why += 'look at the images'
        raise CheckpointError(f'{subject.checkpoint}: {why}; nothing was written')
    load_strictly(build_model(subject.cfg, False), subject.model.state_dict(), subject.checkpoint, 'vanilla')
    return result


def source_warning(subject: Subject) -> str:
    """Returns what is wrong with a model whose moments in the training domain are gathered; empty if nothing is."""
    stamp = subject.meta.get(STAMP)
    if not isinstance(stamp, Mapping) or stamp.get('mode') != 'domain':  # a file may hold anything
        return ''
    return (
        f'{subject.checkpoint} is fitted to a domain already, so its features of training images are not those that it '
        'was trained with; gather the moments of the original checkpoint, and fit that'
    )


def warnings_of(report: CalibrationReport, layers: Sequence[str]) -> list[str]:
    """Returns warnings about a fit, one sentence each; none for other calibrations.

    Args:
        report: Report of the calibration.
        layers: Names of all layers of the model, in the order of execution.
    """
    if report.mode != 'domain':
        return []
    first, large = report.layers[0], [layer for layer in report.layers if layer.moved > LARGE_SHIFT]
    if first.moved > LARGE_SHIFT and first.name == layers[0]:
        return [
            f'{first.name} moves by {first.moved:.2f} times its variance: the images look like another data set '
            'altogether, or like very different light; look at them before you deploy this'
        ]
    if large:
        worst = max(large, key=lambda layer: layer.moved)
        return [
            f'{len(large)} of {len(report.layers)} layers move by more than {LARGE_SHIFT} times their variance (most: '
            f'{worst.name}, {worst.moved:.2f}); evaluate on a few labelled images before you deploy this'
        ]
    return []


class Extractor(nn.Module):
    """The backbone and the neck of a model as one module, ``extract_feat``, so that both can be fitted.

    Args:
        owner: The model, with ``backbone``, ``neck`` and ``extract_feat``; its other parts stay out of this module.
    """

    def __init__(self, owner: nn.Module) -> None:
        super().__init__()
        self.backbone = owner.backbone
        self.neck = owner.neck
        self.__dict__['owner'] = owner  # not a part

    def forward(self, images: Tensor) -> Any:
        """Returns what the neck makes of images, (B, C, H, W)."""
        return self.owner.extract_feat(images)

    @classmethod
    def of(cls, model: nn.Module, name: str) -> nn.Module:
        """Returns the backbone of a model with its neck, or alone where there is no neck with layers to fit.

        Args:
            model: The model.
            name: Name of its backbone.
        """
        *path, last = name.split('.')
        owner = model.get_submodule('.'.join(path))
        neck = getattr(owner, 'neck', None)
        parts = neck.modules() if isinstance(neck, nn.Module) else ()
        has_layers = any(isinstance(part, nn.Linear | nn.Conv2d) for part in parts)
        if last == 'backbone' and has_layers and hasattr(owner, 'extract_feat'):
            return cls(owner)
        return model.get_submodule(name)


class Size(NamedTuple):
    """What one image sends into a layer, or out of it: as many vectors of so many channels."""

    channels: int
    vectors: int


def measure_vectors(
    module: nn.Module, layers: Mapping[str, Any], image: Tensor, inputs: bool = False
) -> dict[str, Size]:
    """Returns the size of what is gathered of each layer for one image, (1, C, H, W); layers that do not run have none.

    Args:
        module: The module.
        layers: Its layers by name.
        image: The image.
        inputs: See :func:`mmdenoiserep.core.collect_moments`.
    """
    sizes: dict[str, Size] = {}

    def note(name: str, forward: Callable, *args: Any, **keywords: Any) -> Tensor:
        output = forward(*args, **keywords)
        (x,) = (*args, *keywords.values())
        features = Features(layers[name], inputs)
        taken = output if features.on_output else x
        channels = taken.shape[-3] if isinstance(layers[name], nn.Conv2d) else taken.shape[-1]
        sizes.setdefault(name, Size(features.channels, taken.numel() // channels))
        return output

    with evaluating(module), intercepting(layers, note):
        run_model(module, image)
    return sizes


def choose_strides(sizes: Mapping[str, Size], images: int) -> dict[str, int]:
    """Returns the stride of the sampling for each layer: 16, or less where ten vectors for each channel need it."""
    return {name: max(1, min(16, images * size.vectors // (10 * size.channels))) for name, size in sizes.items()}


def describe_strides(strides: int | Mapping[str, int]) -> str:
    """Returns which part of the vectors was taken, as a text."""
    numbers = {strides} if isinstance(strides, int) else set(strides.values())
    least, most = min(numbers, default=1), max(numbers, default=1)
    return f'one in {least}' if least == most else f'one in {least} (late layers) to {most}'


def limit_images(subject: Subject, gibibytes: float, stride: Stride) -> None:
    """Takes as many images, spread over all, as a fit can hold in memory; prints how many if not all.

    Args:
        subject: The model and the images.
        gibibytes: Memory in each process, GiB.
        stride: See :func:`mmdenoiserep.core.collect_moments`.
    """
    one = paused_bytes(subject.part, subject.layers, subject.example, stride)
    total = sum_processes(len(subject.images.dataset))
    subject.images.take(max(2, min(gather_processes(int(gibibytes * 2**30 / one)))))  # a single one shows no difference
    taken = sum_processes(len(subject.images.dataset))
    if taken < total:
        print(f'takes {taken} of {total} images, whose features fit into {gibibytes:g} GiB (--memory)')


@contextmanager
def with_progress_bar(images: Batches) -> Iterator[Iterable[Tensor]]:
    """Yields the batches with a progress bar over the images."""
    with tqdm(total=len(images.dataset), unit='image', disable=get_rank() != 0) as bar:
        yield ProgressBatches(images, bar)


@contextmanager
def layer_bar(layers: int) -> Iterator[Callable[[str], None]]:
    """Yields a function that moves a progress bar over layers, with the time left."""
    with tqdm(total=layers, unit='layer', disable=get_rank() != 0) as bar:
        yield lambda name: (bar.set_postfix_str(name, refresh=False), bar.update())[-1]


class ProgressBatches:
    """Batches that advance a progress bar when they are read."""

    def __init__(self, images: Batches, bar: tqdm) -> None:
        self.images = images
        self.bar = bar

    def __iter__(self) -> Iterator[Tensor]:
        self.bar.reset()  # a second pass may be needed
        for batch in self.images:
            yield batch
            self.bar.update(len(batch))
        self.bar.update(len(self.images.dataset) - len(self.images.order))  # left out
