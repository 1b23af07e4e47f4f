"""Compares the features of two models on clean and corrupted images.

The signal-to-noise ratio of a layer with output x on clean images and x~ on the same images corrupted, mu = E x, is

    ``SNR = 10 log10( E|x - mu|^2 / E|x~ - x|^2 )  dB``
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.registry import DATASETS, VISUALIZERS
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.data import Dataset
from tqdm import tqdm

from ..core import InputError, Moments, evaluating
from ..core.method.probe import run_model
from ..core.method.sample import Sample
from ..core.method.targets import near_names
from ..core.utils.randomness import equal_draws
from ..core.utils.tensors import tensors_in
from .arguments import at_least
from .backbones import check_input, predicting_backbone
from .calibration import Size, choose_strides, describe_strides
from .corruptions import SEVERITIES, corrupt, make_transform
from .errors import config_at_fault, config_path
from .images import Batches, NoImage, datasets_of, leaves, open_images, take_spread
from .model import open_model, to_device
from .pixels import to_rgb

VARIANTS = tuple((model, images) for model in ('before', 'after') for images in ('clean', 'corrupted'))
"""The four variants: (model, images)."""
RATIOS = {
    'before': (('before', 'clean'), ('before', 'corrupted')),
    'after': (('after', 'clean'), ('after', 'corrupted')),
    'restored': (('before', 'clean'), ('after', 'corrupted')),
}
"""The variants that each signal-to-noise ratio compares: the signal, and the signal with noise."""
STAGE = re.compile(r'(layer|stage|block)s?[._]?\d+')
"""Names of the modules of a backbone whose features are drawn."""
MOST_STAGES, MOST_SPECTRA = 4, 9
SHORT_EDGE = 224
"""Shorter edge in pixels to which an image is enlarged before the predicted class is written on it."""


class CorruptedImages(Dataset):
    """Images of a data set, corrupted right after loading; image i depends on the seed and on i alone.

    Args:
        dataset: :class:`mmdenoiserep.apis.images.Images`.
        corruption: See :func:`mmdenoiserep.apis.corruptions.corrupt`.
        severity: See :func:`mmdenoiserep.apis.corruptions.corrupt`.
        seed: See :func:`mmdenoiserep.apis.corruptions.corrupt`.

    Attributes:
        image: The image read last, (H, W, C) or (H, W), in the dtype of the loaded image; three channels are BGR.
    """

    def __init__(self, dataset: Any, corruption: str, severity: float = 0, seed: int = 0) -> None:
        self.dataset = dataset.after_loading(self._corrupt)
        self.how = corruption, severity, seed
        self.image = np.empty(0)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any] | NoImage:
        with equal_draws(seed=index):  # the pipeline may have random steps, such as a crop
            return self.dataset[index]

    def _corrupt(self, image: np.ndarray, index: int) -> np.ndarray:
        """Corrupts a loaded image."""
        swap = (..., slice(None, None, -1)) if self.dataset.is_rgb and image.shape[2:] == (3,) else ...
        self.image = corrupt(image[swap], *self.how, index)
        return self.image[swap]


class SignalToNoise:
    """A signal-to-noise ratio, accumulated batch by batch in float64."""

    def __init__(self) -> None:
        self.count = 0
        self.total: Tensor | float = 0.0
        self.square: Tensor | float = 0.0
        self.noise: Tensor | float = 0.0

    def update(self, signal: Tensor, noisy: Tensor) -> None:
        """Adds a batch of vectors, (groups, C/g, n), without and with noise."""
        signal, noisy = signal.double(), noisy.double()
        self.count += signal.shape[-1]
        self.total = self.total + signal.sum(-1)
        self.square = self.square + signal.square().sum()
        self.noise = self.noise + (noisy - signal).square().sum()

    @property
    def decibels(self) -> float:
        """The variance of the signal over the mean square of the noise, in dB; infinite without noise."""
        signal = self.square - self.total.square().sum() / self.count
        return 10 * torch.log10(signal / self.noise).item()


@dataclass
class LayerStatistics:
    """Statistics of the layers' outputs over many images.

    Attributes:
        types: Class name of each layer by layer name, in the order of execution.
        ratios: Signal-to-noise ratios, by a name in ``RATIOS`` and by layer.
        moments: Moments of the outputs of some layers, by variant and by layer.
        embeddings: Last output of the backbone averaged over positions, (N, C), float32, by variant.
        labels: Classes of the images; None where they are not known.
        strides: Which part of the vectors (tokens, pixels) was taken, as a text.
    """

    types: dict[str, str]
    ratios: dict[str, dict[str, SignalToNoise]]
    moments: dict[tuple[str, str], dict[str, Moments]]
    embeddings: dict[tuple[str, str], Tensor]
    labels: list[int] | None
    strides: str


@dataclass
class ImageView:
    """One image, and the features, attention and prediction of one model for it.

    Attributes:
        image: The image, RGB, (H, W, 3), uint8.
        stages: Feature maps by stage of the backbone, (C, h, w).
        attention: Attention that each position receives in the last global attention layer, (h, w), averaged over
            heads; 1 is uniform attention. None without such a layer.
        prediction: The image with the prediction drawn on it, RGB, (H', W', 3), uint8; None without a visualizer.
    """

    image: np.ndarray
    stages: dict[str, Tensor]
    attention: Tensor | None
    prediction: np.ndarray | None


def backbone_of(model: nn.Module) -> nn.Module:
    """Returns the backbone that produces the predictions of a model."""
    return model.get_submodule(predicting_backbone(model))


class Visualization:
    """Two checkpoints of one config, compared on clean and corrupted images.

    Args:
        cfg: Config of both checkpoints.
        before: Path of the checkpoint before denoising or a domain fit.
        after: Path of the checkpoint after it; denoisers in it are fused.
        folder: Folder of clean images; None takes the test data set of the config.
        corruption: Corruption of the images, see :func:`~.corruptions.corrupt`.
        severity: Severity of the corruption; None takes the default of :data:`~.corruptions.SEVERITIES`.
        seed: Seed of the corruption, 0 or more.
        num_images: Largest number of images for the statistics of the layers, 2 or more.
        shown: Number of images to show.
        batch_size: Batch size of the statistics.
        spectra: Names of the layers whose spectra are drawn; None takes nine of them.
        device: Device to compute on; None takes the GPU, or the CPU without one.

    Raises:
        InputError: A checkpoint or the images can't be used, or do not fit the config.

    Examples:
        >>> cfg = load_config('configs/demo/vit_fashion-mnist.py')
        >>> torch.save(build_model(cfg).state_dict(), 'vit.pth')
        >>> visualization = Visualization(cfg, 'vit.pth', 'vit.pth', num_images=2, device='cpu')
        >>> statistics = visualization.measure()
        >>> write_figures(Path('.'), statistics, visualization.look(), visualization.severity)[0]
        'signal_to_noise.png'
    """

    def __init__(
        self,
        cfg: Config,
        before: str | Path,
        after: str | Path,
        *,
        folder: str | Path | None = None,
        corruption: str = 'noise',
        severity: float | None = None,
        seed: int = 0,
        num_images: int = 200,
        shown: int = 4,
        batch_size: int = 8,
        spectra: str | Sequence[str] | None = None,
        device: str | None = None,
    ) -> None:
        at_least(2, num_images=num_images)
        at_least(1, shown=shown, batch_size=batch_size)
        severity = SEVERITIES.get(corruption, 0) if severity is None else severity
        make_transform(corruption, severity, seed)
        spectra = [spectra] if isinstance(spectra, str) else spectra
        self.severity = f'{corruption} {severity:.3g}'
        self.num_images = num_images
        self.shown = shown
        self.batch_size = batch_size
        self.paths = dict(before=before, after=after)
        self.models, metas = {}, {}
        for which, path in self.paths.items():
            model, metas[which] = open_model(cfg, path, denoisers='fold')
            self.models[which] = to_device(model, device)
        with config_at_fault(config_path(cfg)):
            self._open(cfg, folder, (corruption, severity, seed), metas['before'], spectra)

    def _open(
        self,
        cfg: Config,
        folder: Path | None,
        how: tuple[str, float, int],
        meta: Mapping[str, Any],
        spectra: Sequence[str] | None,
    ) -> None:
        dataset = open_images(cfg, 'test', folder, self.models['before'])
        self.images = {
            'clean': CorruptedImages(dataset, 'clean'),
            'corrupted': CorruptedImages(dataset, *how),
        }
        if len(self._chosen) < 2:
            raise InputError('one image is not enough; take two or more')
        labels = [] if folder else [dataset.info(i).get('gt_label') for i in self._chosen]
        self.labels = None if None in labels else labels or None
        self.visualizer = self._build_visualizer(cfg, meta.get('dataset_meta'))
        example = next(iter(self._batches('clean', self._chosen)))
        check_input(self.models['before'], predicting_backbone(self.models['before']), example)
        outputs = run_backbone(backbone_of(self.models['before']), example)[0]  # (groups, C/g, n) each
        names = list(outputs)
        if wrong := set(spectra or ()) - set(names):
            raise InputError(f'the backbone has no layer {min(wrong)}{near_names(min(wrong), names)}')
        self.spectra = list(spectra or ()) or pick_evenly(names, MOST_SPECTRA)
        sizes = {name: Size(x.shape[0] * x.shape[1], x.shape[2]) for name, x in outputs.items()}
        self.strides = choose_strides(sizes, len(self._chosen))

    def _build_visualizer(self, cfg: Config, dataset_meta: Mapping[str, Any] | None) -> Any:
        if not cfg.get('visualizer'):
            return None
        visualizer = VISUALIZERS.build(dict(cfg.visualizer, name='visualize', vis_backends=None))
        leaf = next(leaf for dataset in datasets_of(cfg, 'test') for leaf in leaves(dataset))
        if isinstance(leaf, dict):
            with DATASETS.switch_scope_and_registry(None) as registry:
                kind = registry.get(leaf['type']) if isinstance(leaf['type'], str) else leaf['type']
            known = {**getattr(kind, 'METAINFO', {}), **leaf.get('metainfo', {})}
        else:
            known = getattr(leaf, 'metainfo', {})
        visualizer.dataset_meta = dataset_meta or known
        return visualizer

    @property
    def _chosen(self) -> list[int]:
        return take_spread(self.images['clean'], self.num_images).indices

    def _batches(self, images: str, chosen: Sequence[int], batch_size: int = 1) -> Batches:
        return Batches(self.models['before'], torch.utils.data.Subset(self.images[images], chosen), batch_size)

    def measure(self) -> LayerStatistics:
        """Runs both models on all images, clean and corrupted, and returns the statistics of their layers."""
        statistics = LayerStatistics(
            {},
            {key: {} for key in RATIOS},
            {key: {} for key in VARIANTS},
            {},
            self.labels,
            describe_strides(self.strides),
        )
        embeddings: dict[tuple[str, str], list[Tensor]] = {key: [] for key in VARIANTS}
        pairs = [self._batches(images, self._chosen, self.batch_size) for images in ('clean', 'corrupted')]
        pairs[1].left_out = pairs[0].left_out  # each is reported once
        with tqdm(total=len(self._chosen), unit='image', desc='layers') as bar:
            for clean, corrupted in zip_longest(*pairs):
                if pairs[0].order != pairs[1].order:
                    sentence = list(pairs[0].left_out)[-1]
                    raise InputError(
                        f'{sentence}, but not both clean and corrupted; take another corruption or severity'
                    )
                batches = dict(clean=clean, corrupted=corrupted)
                features = {}
                for which, images in VARIANTS:
                    backbone = backbone_of(self.models[which])
                    features[which, images], embedding = run_backbone(backbone, batches[images], self.strides)
                    if not embedding.isfinite().all():
                        raise InputError(f'the features of {self.paths[which]} hold NaN or Inf; look at its weights')
                    embeddings[which, images].append(embedding.float().cpu())
                for key, (signal, noisy) in RATIOS.items():
                    for name, vectors in features[signal].items():
                        statistics.ratios[key].setdefault(name, SignalToNoise()).update(vectors, features[noisy][name])
                for variant, moments in statistics.moments.items():
                    for name in self.spectra:
                        vectors = features[variant][name]
                        moments.setdefault(name, Moments(*vectors.shape[:2], vectors.device)).update(vectors)
                bar.update(len(clean))
        if self.labels:
            statistics.labels = [self.labels[number] for number in pairs[0].order]
        backbone = backbone_of(self.models['before'])
        statistics.types = {name: type(backbone.get_submodule(name)).__name__ for name in statistics.ratios['before']}
        statistics.embeddings = {key: torch.cat(parts) for key, parts in embeddings.items()}
        return statistics

    def look(self) -> list[dict[tuple[str, str], ImageView]]:
        """Runs both models on the images to show, and returns the four views of each image by variant.

        Raises:
            InputError: The config leaves out all images to show.
        """
        chosen = take_spread(self.images['clean'], self.shown).indices
        chosen = [index for index in chosen if not isinstance(self.images['clean'][index], NoImage)]
        if not chosen:
            raise InputError('the config leaves out all images to show; show more of them')
        return [
            {variant: self._view(index, *variant) for variant in VARIANTS}
            for index in tqdm(chosen, unit='image', desc='views')
        ]

    def _view(self, index: int, which: str, images: str) -> ImageView:
        model, dataset = self.models[which], self.images[images]
        (batch,) = self._batches(images, [index])
        image = to_rgb(dataset.image)
        return ImageView(
            image, *inspect_backbone(backbone_of(model), batch), self._predict(model, dataset[index], image)
        )

    def _predict(self, model: nn.Module, packed: Any, image: np.ndarray) -> np.ndarray | None:
        """Returns the image with the prediction of the whole model, drawn by the visualizer of the config."""
        if self.visualizer is None:
            return None
        with evaluating(model):
            sample = model.test_step(pseudo_collate([packed]))[0]
        if hasattr(self.visualizer, 'visualize_cls'):  # mmpretrain's has a method for each task
            return self.visualizer.visualize_cls(
                image, sample, draw_gt=False, resize=max(SHORT_EDGE, min(image.shape[:2]))
            )
        np.random.seed(0)  # mmdet draws random mask colors: the same ones in all variants
        self.visualizer.add_datasample('prediction', image, sample, draw_gt=False)
        return self.visualizer.get_image()

    def missing(self, views: Sequence[Mapping[tuple[str, str], ImageView]]) -> list[str]:
        """Returns a sentence for each figure that can't be drawn."""
        seen = views[0]['before', 'clean']
        kind = type(backbone_of(self.models['before'])).__name__
        sentences = [] if seen.attention is not None else [f'no attention.png: {kind} has no global attention']
        return sentences + ([] if self.visualizer else ['no predictions.png: the config has no visualizer'])


def pick_evenly(names: Sequence[str], count: int) -> list[str]:
    """Returns at most ``count`` names at even distances, among them the first and the last."""
    return [names[i] for i in sorted(set(np.linspace(0, len(names) - 1, count).round().astype(int)))]


def run_backbone(
    backbone: nn.Module, images: Tensor, strides: Mapping[str, int] | None = None
) -> tuple[dict[str, Tensor], Tensor]:
    """Runs a backbone and returns the outputs of its Linear layers and convolutions, and its embeddings.

    Args:
        backbone: The backbone.
        images: Preprocessed images, (B, C, H, W).
        strides: Takes one in so many vectors of a layer, the same ones in every call; None takes all.

    Returns:
        The outputs by layer, (groups, C/g, n), in the order of execution; the last output averaged over positions,
        (B, C).
    """
    features: dict[str, list[Tensor]] = {}
    sample = Sample()

    def listen(name: str, layer: nn.Module) -> Any:
        return layer.register_forward_hook(
            lambda layer, args, output: features.setdefault(name, []).append(
                sample(layer, output, (strides or {}).get(name, 1))
            )
        )

    handles = [listen(n, m) for n, m in backbone.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    try:
        with evaluating(backbone), equal_draws(backbone):
            *_, last = tensors_in(run_model(backbone, images))
    finally:
        for handle in handles:
            handle.remove()
    embedding = last.mean((2, 3)) if last.dim() == 4 else last.mean(1) if last.dim() == 3 else last
    return {name: torch.cat(parts, -1) for name, parts in features.items()}, embedding


class AttentionRecorder(TorchFunctionMode):
    """Records the weights of the last self-attention of one image, whatever torch function computes them.

    Attributes:
        found: Attention weights, (tokens, tokens), averaged over heads; None before the first attention.
    """

    found: Tensor | None = None

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func is F.scaled_dot_product_attention:
            self._keep(attention_weights(*args, **kwargs))
        elif func is F.multi_head_attention_forward:
            self._keep(result[1])
        elif func in (F.softmax, torch.softmax, torch.Tensor.softmax):
            self._keep(result)
        return result

    def _keep(self, weights: Tensor | None) -> None:
        """Keeps weights of shape (1, heads, tokens, tokens) or (1, tokens, tokens)."""
        if weights is None or weights.dim() not in (3, 4):
            return
        if len(weights) == 1 and weights.shape[-2] == weights.shape[-1] > 1:
            self.found = weights.flatten(0, -3).mean(0)


def attention_weights(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Returns the attention weights with all masks and scales: the attention to one-hot values."""
    identity = torch.eye(key.shape[-2], device=key.device, dtype=key.dtype).expand(*key.shape[:-1], -1)
    return F.scaled_dot_product_attention(query, key, identity, *args, **kwargs)


def inspect_backbone(backbone: nn.Module, image: Tensor) -> tuple[dict[str, Tensor], Tensor | None]:
    """Runs a backbone on one image, (1, C, H, W).

    Returns:
        Feature maps by stage, (C, h, w); the attention map of :class:`ImageView`, (h, w), or None.
    """
    ratio = image.shape[2] / image.shape[3]
    seen: dict[str, Tensor] = {}

    def listen(name: str, part: nn.Module) -> Any:
        return part.register_forward_hook(lambda part, args, output: seen.update({name: next(tensors_in(output))}))

    handles = [listen(name, part) for name, part in backbone.named_modules() if STAGE.fullmatch(name)]
    try:
        with evaluating(backbone), equal_draws(backbone), AttentionRecorder() as attention:
            output = run_model(backbone, image)
    finally:
        for handle in handles:
            handle.remove()
    seen = seen or {f'output {i}': x for i, x in enumerate(tensors_in(output))}
    maps = {name: to_map(x, ratio) for name, x in seen.items()}
    stages = {name: x.cpu() for name, x in maps.items() if x is not None}
    windows = any(hasattr(part, 'window_size') for part in backbone.modules())
    return stages, None if windows or attention.found is None else attention_map(attention.found, ratio)


def to_map(x: Tensor, ratio: float) -> Tensor | None:
    """Returns features of one image as a map, (C, h, w); None where they form no map.

    Args:
        x: Features, (1, C, h, w), (1, h, w, C) or (1, tokens, C).
        ratio: Height over width of the image, which tells the layouts apart.
    """
    if x.dim() == 4:
        off_first, off_last = (abs(np.log(h / w / ratio)) for h, w in (x.shape[2:], x.shape[1:3]))
        return x[0] if off_first <= off_last else x[0].permute(2, 0, 1)
    grid = find_grid(x.shape[1], ratio) if x.dim() == 3 else None
    return x[0, grid[0] :].mT.unflatten(1, grid[1:]) if grid else None


def find_grid(tokens: int, ratio: float) -> tuple[int, int, int] | None:
    """Returns the number of class tokens, and the height and width of the map of the other tokens; None without one."""
    for extra in range(3):
        height = max(1, round((max(tokens - extra, 1) * ratio) ** 0.5))
        width = (tokens - extra) // height
        if width and height * width == tokens - extra and 0.7 < height / width / ratio < 1.4:
            return extra, height, width
    return None


def attention_map(weights: Tensor, ratio: float) -> Tensor | None:
    """Returns the attention that each position receives from the class token, or on average without one; (h, w).

    The weights, (tokens, tokens), are scaled so that uniform attention is 1.
    """
    if not (grid := find_grid(len(weights), ratio)):
        return None
    extra, height, width = grid
    row = weights[0] if extra else weights.mean(0)
    return (row[extra:] * len(weights)).reshape(height, width).cpu()
