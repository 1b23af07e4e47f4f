"""Measures one pretrained model: what a domain fit to corrupted photographs does to its predictions for others."""

import copy
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import update_bn

from mmdenoiserep.apis.agreement import Tally, tally
from mmdenoiserep.apis.calibration import SOME, choose_strides, measure_vectors
from mmdenoiserep.apis.candidates import CANDIDATES, NOTHING, Candidates
from mmdenoiserep.apis.corruptions import make_transform
from mmdenoiserep.apis.distances import measure_distances
from mmdenoiserep.apis.gate import decide
from mmdenoiserep.core import collect_moments, fit_domain, select_layers
from studies.real_weights.models import MODELS
from studies.real_weights.photographs import crops
from studies.rivals import BLIND, FILTERS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

SEVERITIES = dict(noise=40 / 255, shot=0.1, blur=2.0, jpeg=10, contrast=0.4, occlusion=0.4)
"""Severities by corruption, see :func:`mmdenoiserep.apis.corruptions.corrupt`."""
SOURCE, TEST = 9, 4
"""Crops of each photograph for the moments in the training domain, and to test on."""
CHOOSE = 92
"""Number of crops that a filter is chosen on."""
BATCH = 32
"""Number of crops in a batch."""
CHECK = 'the check'
"""Key of the candidate that the check chooses."""


def corrupt(images: 'NDArray[np.uint8]', corruption: str, seed: int) -> 'NDArray[np.uint8]':
    """Returns corrupted BGR images, (N, H, W, 3)."""
    import numpy as np

    if corruption == 'clean':
        return images
    transform = make_transform(corruption, SEVERITIES[corruption], seed)
    return np.stack([transform(image=np.ascontiguousarray(image[..., ::-1]))['image'][..., ::-1] for image in images])


def smooth(images: 'NDArray[np.uint8]', name: str) -> 'NDArray[np.uint8]':
    """Returns images, (N, H, W, 3), behind a filter of :data:`FILTERS`."""
    import numpy as np

    return np.stack([FILTERS[name](np.ascontiguousarray(image)) for image in images])


class RealWeights:
    """One pretrained model, its moments on clean photographs, and crops of others to test on.

    Args:
        name: Name of the model in :data:`MODELS`.
        photographs: Files by the names of the splits.
        count: Number of crops to fit to.
    """

    def __init__(self, name: str, photographs: 'Mapping[str, Sequence[Path]]', count: int) -> None:
        self.spec, self.photographs, self.count = MODELS[name], photographs, count
        self.model = self.spec.build()
        clean = self.batches(crops(photographs['source'], SOURCE, seed=1))
        self.layers = select_layers(self.model, 'all', example_input=clean[0][:2])
        self.vectors = measure_vectors(self.model, self.layers, clean[0][:1])
        images = SOURCE * len(photographs['source'])
        self.source = collect_moments(self.model, self.layers, clean, stride=choose_strides(self.vectors, images))
        self.training = measure_distances(self.model, self.layers, clean, self.source)
        held = len(photographs['fit']) // 5  # photographs
        each = -(-count // (len(photographs['fit']) - held))
        self.pool, self.held = crops(photographs['fit'], each, seed=2), each * held
        self.test = crops(photographs['test'], TEST, seed=3)
        self.clean_test = self.predict(self.model, self.test)
        self.choose = self.pool[:: max(1, len(self.pool) // CHOOSE)]
        self.clean_choose = self.predict(self.model, self.choose)

    def batches(self, images: 'NDArray[np.uint8]') -> list[Tensor]:
        """Returns preprocessed images in batches."""
        return list(self.spec.preprocess(images).split(BATCH))

    def outputs(self, model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Returns features, (N, C), and probabilities of the classes, if there are classes, (N, K)."""
        with torch.inference_mode():
            features = self.spec.features(model, images)
            head = self.spec.head
            return features, model.get_submodule(head)(features).softmax(1) if head else None

    def predict(self, model: nn.Module, images: 'NDArray[np.uint8]') -> tuple[Tensor, Tensor | None]:
        """Returns normalised features, (N, C), and classes, (N,), or None."""
        features, probabilities = zip(*(self.outputs(model, batch) for batch in self.batches(images)), strict=True)
        classes = torch.cat(probabilities).argmax(1) if self.spec.head else None
        return F.normalize(torch.cat(features)), classes

    def compare(self, model: nn.Module, images: 'NDArray[np.uint8]', clean: tuple) -> dict[str, list[int]]:
        """Compares predictions for corrupted crops with those of the untouched model for the clean ones.

        Returns:
            By metric, 0 or 1 for each crop: whether the features are nearest to those of the same crop (cosine), and
            whether the class is the same.
        """
        (features, classes), (known, labels) = self.predict(model, images), clean
        nearest = (features @ known.T).argmax(1)
        result = dict(retrieval=(nearest == torch.arange(len(known))).int().tolist())
        return result if classes is None else result | dict(agreement=(classes == labels).int().tolist())

    def score(self, model: nn.Module, images: 'NDArray[np.uint8]') -> dict[str, list[int]]:
        """Compares predictions for the test crops, see :meth:`compare`."""
        return self.compare(model, images, self.clean_test)

    def measure(self, corruption: str) -> dict[str, Any]:
        """Measures all methods under one corruption.

        Returns:
            ``scores`` by method and metric, ``back`` (the scores on clean crops after the fit of all layers),
            ``filter`` and ``check`` (what was chosen), ``seen`` (the score of each candidate), and ``distances``.
        """
        pool, test = corrupt(self.pool, corruption, 0), corrupt(self.test, corruption, 1)
        held, to_fit = pool[: self.held], pool[self.held :][: self.count]
        model = copy.deepcopy(self.model)
        layers = {name: model.get_submodule(name) for name in self.layers}
        candidates = Candidates(model, layers)
        strides = choose_strides(self.vectors, len(to_fit))
        fit_domain(model, layers, self.batches(to_fit), self.source, stride=strides, progress=candidates.note)
        scores, seen = {}, {}
        for name in CANDIDATES:
            candidates.apply(name)
            scores[name] = self.score(model, test)
            if name == NOTHING or candidates.twins()[name] != NOTHING:
                seen[name] = self.agreement(model, held)
        candidates.apply('all')
        back = self.score(model, self.test)
        candidates.apply(NOTHING)
        some = self.batches(held) + self.batches(to_fit[:: max(1, len(to_fit) // SOME)])
        distances = measure_distances(model, layers, some, self.source).relative_to(self.training)
        picked = decide(seen, distances)
        scores[CHECK] = scores[picked]
        best = self.best_filter(corruption)
        scores['filter, blind'] = self.score(self.model, smooth(test, BLIND))
        scores['filter, chosen'] = self.score(self.model, smooth(test, best))
        if any(isinstance(module, nn.BatchNorm2d) for module in self.model.modules()):
            normalised = copy.deepcopy(self.model)
            update_bn([self.spec.preprocess(to_fit)], normalised)
            scores['BatchNorm'] = self.score(normalised.eval(), test)
        found = dict(filter=best, check=picked, seen=seen, distances=distances, images=len(to_fit))
        return dict(scores=scores, back=back, **found)

    def agreement(self, model: nn.Module, images: 'NDArray[np.uint8]') -> Any:
        """Returns the score of a candidate on images that were not fitted to."""
        tallies = Tally()
        for batch in self.batches(images):
            pairs = (self.samples(*self.outputs(model, part)) for part in (batch, batch.flip(-1)))
            for sample, mirrored in zip(*pairs, strict=True):
                tallies.add(tally(sample, mirrored))
        return tallies.score()

    @staticmethod
    def samples(features: Tensor, probabilities: Tensor | None) -> list[SimpleNamespace]:
        """Returns the predictions for each image as a model of mmpretrain gives them."""
        if probabilities is None:
            return [SimpleNamespace(pred_feature=feature) for feature in features]
        return [SimpleNamespace(pred_score=score) for score in probabilities]

    def best_filter(self, corruption: str) -> str:
        """Returns the filter with which most predictions for crops of the fit are those for clean ones."""
        images = corrupt(self.choose, corruption, 0)

        def kept(name: str) -> tuple[int, ...]:
            found = self.compare(self.model, smooth(images, name), self.clean_choose)
            return tuple(sum(values) for values in reversed(found.values()))

        return max(FILTERS, key=kept)
