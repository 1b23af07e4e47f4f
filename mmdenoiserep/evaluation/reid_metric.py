"""The metric of re-identification for mmengine's evaluator."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from mmengine.evaluator import BaseMetric
from mmengine.logging import print_log
from mmengine.registry import METRICS
from torch import Tensor

from ..core import InputError
from ..core.files.atomic import atomic_file
from .reid_ranking import Ranking, rank_matches

KEYS = ('sample_idx', 'img_path', 'pid', 'camid', 'is_query')
"""The metainfo of an image that the metric needs."""


@METRICS.register_module()
class ReIDMetric(BaseMetric):
    """mAP, CMC and mINP of re-identification in percent, see :func:`~.reid_ranking.rank_matches`.

    One dataloader gives both queries and gallery. Samples have ``pred_feature``, (C,), and the metainfo ``sample_idx``,
    ``img_path``, ``pid``, ``camid`` and ``is_query``.

    ``trials`` selects the protocol of VehicleID (Liu et al., CVPR 2016): in each trial one random image of every
    identity is the gallery and all other images are queries; the metrics are averaged over the trials. ``is_query`` is
    ignored, and so is ``camid``, except by ``centre_cameras``. The gallery depends on seed, trial and ``sample_idx``
    alone.

    ``centre_cameras`` subtracts the mean feature of each camera before the normalisation, see :func:`centre_by_camera`.
    It uses the statistics of the test set, so its results do not compare with published ones; the metrics have the
    prefix ``reid_centred``, and the log names the cameras.

    Args:
        topk: Ranks k of the CMC; the metrics are named ``rank<k>``.
        normalize: Whether to normalise features to length 1.
        trials: Number of trials; None takes queries and gallery from ``is_query``.
        seed: Seed of the trials, 0 or more.
        matches_file: JSON file to write after each evaluation, for ``draw_matches.py``: a list with an entry
            ``{sample_idx, img_path, pid, camid, ap, matches}`` for each query that has a match in the gallery.
            ``matches`` lists the nearest gallery images, ``{sample_idx, img_path, pid, camid, distance, correct}``,
            with the squared Euclidean distance. With ``trials``, the file has the first trial.
        num_matches: Number of gallery images for each query in ``matches_file``.
        centre_cameras: Whether to subtract the mean feature of each camera.
        collect_device: Device to gather the results of several processes on, ``'cpu'`` or ``'gpu'``.
        prefix: Prefix of the names of the metrics; ``'reid'`` by default, ``'reid_centred'`` with ``centre_cameras``.

    Raises:
        InputError: ``topk``, ``trials`` or ``num_matches`` is not positive, or the file is not named ``.json``.
    """

    default_prefix = 'reid'

    def __init__(
        self,
        topk: Sequence[int] = (1, 5, 10),
        normalize: bool = True,
        trials: int | None = None,
        seed: int = 0,
        matches_file: str | None = None,
        num_matches: int = 10,
        centre_cameras: bool = False,
        collect_device: str = 'cpu',
        prefix: str | None = None,
    ) -> None:
        for name, value in (('topk', min(topk, default=0)), ('trials', trials), ('num_matches', num_matches)):
            if value is not None and value < 1:
                raise InputError(f'{name} of ReIDMetric must be 1 or more, got {value}')
        if matches_file is not None and not matches_file.endswith('.json'):
            raise InputError(f'matches_file of ReIDMetric must end with .json, got {matches_file}')
        super().__init__(collect_device=collect_device, prefix=prefix or ('reid_centred' if centre_cameras else None))
        self.topk = tuple(topk)
        self.normalize = normalize
        self.trials = trials
        self.seed = seed
        self.matches_file = matches_file
        self.num_matches = num_matches
        self.centre_cameras = centre_cameras

    def process(self, data_batch: Any, data_samples: Sequence[dict]) -> None:
        """Stores the features of a batch on the CPU.

        Args:
            data_batch: Not used.
            data_samples: Predictions of the model as dicts.

        Raises:
            InputError: A sample lacks a key, or its feature is not finite or not a vector.
        """
        for sample in data_samples:
            if 'pred_feature' not in sample:
                raise InputError('ReIDMetric needs pred_feature, which heads such as BNNeckReIDHead predict')
            if missing := [key for key in KEYS if key not in sample]:
                raise InputError(
                    f'ReIDMetric needs {", ".join(missing)} of every sample: end the test pipeline with '
                    f'PackInputs(meta_keys={KEYS}), and take a data set of re-identification'
                )
            feature = sample['pred_feature'].detach()
            feature = feature.to('cpu', torch.promote_types(feature.dtype, torch.float32))
            if feature.ndim != 1:
                raise InputError(f'pred_feature must have the shape (C,), got {tuple(feature.shape)}')
            if not feature.isfinite().all():
                raise InputError(f'pred_feature of {sample["img_path"]} has NaN or infinite values: check the weights')
            self.results.append(
                dict(
                    sample_idx=int(sample['sample_idx']),
                    img_path=str(sample['img_path']),
                    pid=int(sample['pid']),
                    camid=int(sample['camid']),
                    is_query=bool(sample['is_query']),
                    feature=feature.numpy().copy(),  # a view would keep all tokens of the batch in memory
                )
            )

    def compute_metrics(self, results: list[dict]) -> dict[str, float]:
        """Returns the metrics in percent, and writes ``matches_file``.

        Args:
            results: Results of :meth:`process`, from all processes.

        Raises:
            InputError: There is no query, no gallery, or no query with a match, or ``centre_cameras`` finds fewer than
                two cameras.
        """
        images = sorted(results, key=lambda image: image['sample_idx'])
        if not images:
            raise InputError('ReIDMetric got no images: check the test data set')
        features = torch.from_numpy(np.stack([image['feature'] for image in images]))
        camids = torch.tensor([image['camid'] for image in images])
        if self.centre_cameras:
            features = centre_by_camera(features, camids)
        if self.normalize:
            features = F.normalize(features)
        pids = torch.tensor([image['pid'] for image in images])
        splits: Iterable[Tensor]
        if self.trials is None:
            splits = [torch.tensor([image['is_query'] for image in images])]
        else:
            splits = (draw_queries(pids, self.seed, trial) for trial in range(self.trials))
            camids = torch.arange(len(images))  # a camera for each image, so none is removed from the gallery

        figures: list[dict[str, float]] = []
        for is_query in splits:
            query, gallery = is_query.nonzero().squeeze(1), (~is_query).nonzero().squeeze(1)
            self._require_both(len(query), len(gallery))
            ranking = rank_matches(
                features[query],
                features[gallery],
                pids[query],
                pids[gallery],
                camids[query],
                camids[gallery],
                num_nearest=self.num_matches if self.matches_file and not figures else 0,
            )
            if not len(ranking.queries):
                raise InputError(
                    f'none of the {len(query)} queries has a match in the gallery from another camera: '
                    'check pid and camid of the data set'
                )
            if not figures:
                print_log(
                    f'ReIDMetric: {len(query):,} queries, {len(gallery):,} gallery images; '
                    f'{len(query) - len(ranking.queries):,} queries without a match in the gallery are left out',
                    logger='current',
                )
                if self.matches_file:
                    write_matches(Path(self.matches_file), images, query, gallery, ranking)
            figures.append(ranking.metrics(self.topk))
        return {name: 100 * sum(trial[name] for trial in figures) / len(figures) for name in figures[0]}

    def _require_both(self, queries: int, gallery: int) -> None:
        if not queries or not gallery:
            hint = (
                'every identity has only one image'
                if self.trials
                else 'one test data set has to bring both, or set trials=10 to draw the gallery, as for VehicleID'
            )
            raise InputError(f'ReIDMetric got {queries} queries and {gallery} gallery images: {hint}')


def centre_by_camera(features: Tensor, camids: Tensor) -> Tensor:
    """Subtracts the mean feature of its camera from each feature, and logs the number of images of the cameras.

    With the images ``S_c`` of camera c, queries and gallery together,

        ``f_i' = f_i - 1 / |S_c| sum_{j in S_c} f_j``,   where c is the camera of image i

    This is the feature normalisation of Song et al., Exploring the Camera Bias of Person Re-identification (ICLR 2025,
    arXiv 2502.10195), without its division by the standard deviation. Camera-based batch normalisation (Zhuang et al.,
    ECCV 2020, arXiv 2001.08680) does it in every BatchNorm layer, in training too. The mean needs no identities.

    Args:
        features: Features before the L2 normalisation, (N, C), float32 or float64.
        camids: Cameras, (N,), integers.

    Returns:
        The centred features, (N, C), in the dtype of ``features``. The mean is taken in float64.

    Raises:
        InputError: All images have the same camera.
    """
    cameras, counts = camids.unique(return_counts=True)
    if len(cameras) < 2:
        raise InputError(
            f'centre_cameras of ReIDMetric needs camera ids, but all {len(camids):,} images have camid {camids[0]}: '
            'leave it off for data without cameras'
        )
    print_log(
        f'ReIDMetric: centre_cameras is on, {len(cameras)} cameras of {counts.min():,} to {counts.max():,} images; '
        'results are not comparable to results without it',
        logger='current',
    )
    centred = torch.empty_like(features)
    for camera in cameras:
        chosen = camids == camera
        own = features[chosen]
        centred[chosen] = own - own.mean(0, dtype=torch.float64).to(own.dtype)
    return centred


def draw_queries(pids: Tensor, seed: int, trial: int) -> Tensor:
    """Returns which images are queries, (N,), bool: all but one random image of each identity.

    Args:
        pids: Identities, (N,).
        seed: Seed of all trials.
        trial: Number of the trial, counted from 0.
    """
    order = np.random.default_rng([seed, trial]).permutation(len(pids))
    _, first = np.unique(pids.numpy()[order], return_index=True)
    is_query = torch.ones(len(pids), dtype=torch.bool)
    is_query[order[first]] = False
    return is_query


def write_matches(path: Path, images: list[dict], query: Tensor, gallery: Tensor, ranking: Ranking) -> None:
    """Writes the nearest gallery images of every query with a match, atomically, as :class:`ReIDMetric` describes.

    Args:
        path: File to write; its folder is created.
        images: Samples with the keys of :data:`KEYS`.
        query: Indices of the queries in ``images``, (Q,).
        gallery: Indices of the gallery in ``images``, (G,).
        ranking: Ranking of the gallery for the queries.
    """

    def describe(index: int) -> dict[str, Any]:
        return {key: images[index][key] for key in ('sample_idx', 'img_path', 'pid', 'camid')}

    entries = []
    for i, index in enumerate(query[ranking.queries].tolist()):
        entry = describe(index)
        found = ranking.distances[i].isfinite()
        matches = [
            dict(describe(other), distance=distance, correct=images[other]['pid'] == entry['pid'])
            for other, distance in zip(
                gallery[ranking.nearest[i][found]].tolist(), ranking.distances[i][found].tolist(), strict=True
            )
        ]
        entries.append(dict(entry, ap=ranking.average_precision[i].item(), matches=matches))
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        file.write(json.dumps(entries).encode())
