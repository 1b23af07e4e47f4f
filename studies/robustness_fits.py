"""The domain fit in the robustness study: all candidates of each fit, and which of them the check chooses."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from mmdenoiserep.apis.calibration import SOME, Extractor, choose_strides, measure_vectors
from mmdenoiserep.apis.candidates import CANDIDATES, Candidates
from mmdenoiserep.apis.distances import Distances, measure_distances
from mmdenoiserep.apis.gate import HELD_OUT, Evidence, decide, gather_evidence
from mmdenoiserep.core import Moments, collect_moments, fit_domain, select_layers
from studies.benchmarks.measure import alternate, cost_ratio
from studies.rivals import NO_FILTER, smooth
from studies.robustness_report import ALL_LAYERS, CANDIDATE_NAMES, CHECK, FILTER
from studies.robustness_run import Images, RobustnessRun

COUNTS = 32, 128
"""Smaller numbers of images."""
SKEWED = 4
"""Number of classes of images that lack the other classes."""
CORRUPTIONS = 'clean', 'noise', 'blur', 'contrast', 'occlusion', 'shot'
"""Corruptions of fewer images, and of those with a few classes."""


@dataclass(frozen=True)
class HeldOut:
    """Images in batches, as the check takes them.

    Attributes:
        run: The measurement.
        dataset: The images.
    """

    run: RobustnessRun
    dataset: Images

    def __iter__(self) -> Iterator[Tensor]:
        yield from self.run.batches(self.dataset.inputs)

    def packed(self) -> Iterator[dict[str, Any]]:
        """Yields batches before the data preprocessor."""
        yield from self.run.packed(self.dataset)


@dataclass(frozen=True)
class Fit:
    """A fit of all layers.

    Attributes:
        model: A copy of the model.
        candidates: Sets it to each candidate.
        evidence: What the check sees.
        chosen: The candidate that it chooses.
    """

    model: nn.Module
    candidates: Candidates
    evidence: Evidence
    chosen: str


@dataclass(frozen=True)
class Source:
    """Moments of backbone and neck, and distances of the first layer, in the training domain."""

    moments: dict[str, Moments]
    distances: Distances


class FitsRun(RobustnessRun):
    """Measures the domain fit.

    Args:
        args: See :class:`RobustnessRun`.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        part, example = Extractor.of(self.model, 'backbone'), self.batch(self.clean[:2])
        self.vectors = measure_vectors(part, select_layers(part, 'all', example_input=example), example[:1])
        self.sources: dict[str, Source] = {}
        self.evidence: list[dict[str, Any]] = []

    def measure(self, filters: dict[str, str]) -> dict[str, Any]:
        """Measures the fit.

        Args:
            filters: The chosen filter by corruption.

        Returns:
            See :class:`robustness_report.Result`.
        """
        tests = self.tests()
        result = dict(table=self.table(tests, filters), latency=self.latency(), counts=self.counts(tests))
        if self.classifies:
            result |= dict(skewed=self.skewed(tests), elsewhere=self.elsewhere(tests))
        return result | dict(evidence=self.evidence)

    def source(self, smoothing: str) -> Source:
        """Returns what is known of the clean images, all smoothed by a filter."""
        if smoothing not in self.sources:
            part, batches = Extractor.of(self.model, 'backbone'), self.batches(smooth(self.clean, smoothing))
            layers = {name: part.get_submodule(name) for name in self.vectors}
            moments = collect_moments(part, layers, batches, stride=choose_strides(self.vectors, len(self.clean)))
            self.sources[smoothing] = Source(moments, measure_distances(part, layers, batches, moments))
        return self.sources[smoothing]

    def fitted(self, images: Images, smoothing: str = NO_FILTER) -> Fit:
        """Fits a copy of the model to images as the tool does: a fifth of them, and at most 200, check the fit.

        Args:
            images: The images, smoothed already.
            smoothing: Filter of the images; the source moments are those of clean images behind the same filter.
        """
        held = min(HELD_OUT, len(images) // 5)
        to_fit, rest = images.inputs[held:], HeldOut(self, images.first(held))
        model, source = copy.deepcopy(self.model), self.source(smoothing)
        part = Extractor.of(model, 'backbone')
        layers = {name: part.get_submodule(name) for name in self.vectors}
        candidates, strides = Candidates(part, layers), choose_strides(self.vectors, len(to_fit))
        fit_domain(part, layers, self.batches(to_fit), source.moments, stride=strides, progress=candidates.note)
        some = self.batches(to_fit[:SOME])
        subject = SimpleNamespace(model=model, part=part, layers=layers, some_images=lambda: some)
        evidence = gather_evidence(subject, candidates, rest, source.moments, source.distances)
        return Fit(model, candidates, evidence, decide(evidence.scores, evidence.distances))

    def scores_of(self, fit: Fit, test: Images) -> dict[str, dict[str, float]]:
        """Returns the scores of all candidates of a fit, and of the one that the check chooses, by method."""
        found: dict[str, dict[str, float]] = {}
        values: dict[str, Tensor] = {}
        for name in CANDIDATES:
            fit.candidates.apply(name)
            values[name] = torch.cat([tensor.flatten() for _, tensor in fit.candidates.owned])
            same = next((other for other in found if torch.equal(values[other], values[name])), None)
            found[name] = found[same] if same else self.score(fit.model, test)
        return {title: found[name] for name, title in CANDIDATE_NAMES.items()} | {CHECK: found[fit.chosen]}

    def compared(self, images: Images, corruption: str, test: Images, label: str) -> dict[str, dict[str, float]]:
        """Fits the model to corrupted images, notes what the check sees, and returns :meth:`scores_of` the fit."""
        fit = self.fitted(self.corrupted(images, corruption))
        distances = fit.evidence.distances
        self.evidence.append(
            dict(
                images=label,
                corruption=corruption,
                chosen=fit.chosen,
                scores={name: list(score) for name, score in fit.evidence.scores.items()},
                distances=list(distances) if distances else None,
            )
        )
        return self.scores_of(fit, test)

    def table(self, tests: dict[str, Images], filters: dict[str, str]) -> dict[str, dict]:
        """Returns scores by corruption, method and metric; each fit gets the corruption of the test images."""
        table = {}
        for corruption, test in tests.items():
            table[corruption] = self.compared(self.target, corruption, test, str(len(self.target)))
            chosen, both = filters[corruption], table[corruption][ALL_LAYERS]
            if chosen != NO_FILTER:
                images = self.corrupted(self.target, corruption)
                fit = self.fitted(Images(smooth(images.inputs, chosen), images.samples), chosen)
                fit.candidates.apply('all')
                both = self.score(fit.model, Images(smooth(test.inputs, chosen), test.samples))
            table[corruption][f'{FILTER} + all layers'] = both
        return table

    def counts(self, tests: dict[str, Images]) -> dict[str, dict]:
        """Returns scores by number of images, corruption, method and metric."""
        return {
            str(count): {
                corruption: self.compared(self.target.first(count), corruption, tests[corruption], str(count))
                for corruption in CORRUPTIONS
            }
            for count in COUNTS
            if count < len(self.target)
        }

    def skewed(self, tests: dict[str, Images]) -> dict[str, Any]:
        """Returns the number of images with a few classes, and their scores as in :meth:`counts`."""
        labels = self.pool.labels
        chosen = torch.isin(labels, self.order(int(labels.max()) + 1)[:SKEWED]).nonzero()[: len(self.target), 0]
        images = Images(self.pool.inputs[chosen], [self.pool.samples[i] for i in chosen.tolist()])
        label = f'{len(images)}, skewed'
        return dict(
            images=len(images),
            scores={c: self.compared(images, c, tests[c], label) for c in CORRUPTIONS},
        )

    def elsewhere(self, tests: dict[str, Images]) -> dict[str, dict]:
        """Returns scores by domain of the fit, domain of the test, method and metric, for domains that differ."""
        noisy = self.corrupted(self.target, 'noise')
        half = len(noisy) // 2
        mixed = torch.cat([noisy.inputs[:half], self.target.inputs[half:]])[self.order(len(noisy))]
        fits = {
            'noise': self.fitted(noisy),
            'half noise, half clean': self.fitted(Images(mixed, self.target.samples)),
        }
        places = 'noise', 'blur', 'clean'
        return {name: {place: self.scores_of(fit, tests[place]) for place in places} for name, fit in fits.items()}

    def latency(self) -> float:
        """Returns the latency of the fitted backbone over the baseline's: the median ratio of alternating pairs."""
        image, fit = self.batch(self.test.inputs[:1]), self.fitted(self.corrupted(self.target, 'noise'))
        fit.candidates.apply('all')
        models = dict(baseline=self.model, fused=fit.model)
        seconds = alternate({n: lambda m=m: m.backbone(image) for n, m in models.items()}, warm_up=10, repeats=100)
        return cost_ratio(seconds['fused'], seconds['baseline']).median
