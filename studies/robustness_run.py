"""The images, the models and the scores of one experiment of the robustness study."""

import json
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.evaluator import Evaluator
from mmengine.registry import DATASETS
from torch import Tensor, nn

from mmdenoiserep.apis.corruptions import make_transform
from mmdenoiserep.apis.model import open_model
from studies import study
from studies.commands import last_checkpoint

CLASSIFICATION = 'fashion-mnist'
REID = 'fashion-reid'
SEVERITIES = {
    CLASSIFICATION: dict(
        noise=0.2, blur=1.2, jpeg=5, contrast=0.3, occlusion=0.4, shot=0.2, haze=0.1, mixture=0.5, varying=0.4
    ),
    'scenes': dict(
        noise=40 / 255,
        blur=2.0,
        jpeg=5,
        contrast=0.5,
        occlusion=0.4,
        shot=0.05,
        colour=0.8,
        haze=0.3,
        mixture=0.7,
        varying=80 / 255,
    ),
    REID: dict(
        noise=40 / 255,
        blur=3.5,
        jpeg=15,
        contrast=0.8,
        occlusion=0.4,
        shot=0.05,
        colour=0.1,
        haze=0.1,
        mixture=0.7,
        varying=80 / 255,
    ),
}
"""Severities by data set and corruption, see :func:`corrupt`; on grey images, a colour cast would be brightness."""
SOURCE = 4000
"""Largest number of clean training images for the moments in the training domain."""
POOL = {CLASSIFICATION: 3000, 'scenes': 300, REID: 2000}
"""Largest number of other training images, corrupted, to choose from, by data set."""
TARGET = 1000
"""Largest number of images of the pool that the table uses, to fit on and to fine-tune on with labels."""
TEST = {CLASSIFICATION: 2500}
"""Largest number of test images; other data sets use all, since their metrics are not means over images."""
BATCH = 100
"""Number of images in a batch, but for training."""
PARTS = 'rivals', 'fits'
"""The parts of a measurement, in their order: the fits need the filters that the rivals choose."""


@dataclass(frozen=True)
class Images:
    """Images packed by the test pipeline.

    Attributes:
        inputs: Images before the data preprocessor, (N, C, H, W), uint8.
        samples: Their data samples.
    """

    inputs: Tensor
    samples: list

    def __len__(self) -> int:
        return len(self.inputs)

    @classmethod
    def load(cls, dataset: Any, chosen: Tensor) -> 'Images':
        """Reads the chosen images of a data set, which must all have one size."""
        packed = [dataset[i] for i in chosen.tolist()]
        return cls(torch.stack([item['inputs'] for item in packed]), [item['data_samples'] for item in packed])

    def first(self, count: int) -> 'Images':
        """Returns the first ``count`` images."""
        return Images(self.inputs[:count], self.samples[:count])

    @property
    def labels(self) -> Tensor:
        """Classes of the images, (N,)."""
        return torch.cat([sample.gt_label for sample in self.samples])


def corrupt(images: Tensor, corruption: str, severity: float, seed: int) -> Tensor:
    """Returns corrupted images; image i depends on the seed and on i alone.

    Args:
        images: Images, (N, C, H, W), uint8; three channels are BGR.
        corruption: See :func:`mmdenoiserep.apis.corruptions.corrupt`.
        severity: See :func:`mmdenoiserep.apis.corruptions.corrupt`.
        seed: Seed of all images.
    """
    if corruption == 'clean':
        return images
    transform = make_transform(corruption, severity, seed)
    rgb = images.flip(1).permute(0, 2, 3, 1).contiguous().numpy()  # (N, H, W, C)
    corrupted = torch.stack([torch.from_numpy(transform(image=image)['image']) for image in rgb])
    return corrupted.permute(0, 3, 1, 2).flip(1).contiguous()


class RobustnessRun:
    """The baseline of one experiment and one seed, with the images to adapt it to and to test it on.

    Args:
        experiment: The experiment.
        folder: Folder of the trainings with this seed.
        seed: Seed of the choice of images and of the corruptions.
        cfg: Config of the baseline.
    """

    def __init__(self, experiment: study.Experiment, folder: Path, seed: int, cfg: Config) -> None:
        self.experiment, self.folder, self.seed, self.cfg = experiment, folder, seed, cfg
        self.severities = SEVERITIES[experiment.data]
        self.classifies = experiment.data == CLASSIFICATION
        self.model = self.trained('baseline')
        test, train = cfg.test_dataloader.dataset, cfg.train_dataloader.dataset
        with redirect_stdout(None):  # pycocotools prints its progress
            tested, trained = DATASETS.build(test), DATASETS.build({**train, 'pipeline': test.pipeline})
        chosen = self.order(len(tested))[: TEST.get(experiment.data)]
        self.test = Images.load(tested, chosen.sort().values)
        order = self.order(len(trained))
        count = min(POOL[experiment.data], len(order) // 2)
        self.pool = Images.load(trained, order[:count])
        self.target = self.pool.first(TARGET)
        self.clean = Images.load(trained, order[count : count + SOURCE]).inputs
        self.evaluator = self.make_evaluator(cfg.test_evaluator, tested.metainfo)

    @staticmethod
    def make_evaluator(config: dict, metainfo: dict) -> Evaluator:
        """Returns an evaluator of a data set with some metainfo."""
        with redirect_stdout(None):
            evaluator = Evaluator(config)
        evaluator.dataset_meta = metainfo
        return evaluator

    def order(self, count: int) -> Tensor:
        """Returns a permutation of the numbers below ``count``, drawn from this seed."""
        return torch.randperm(count, generator=torch.Generator().manual_seed(self.seed))

    def trained(self, step: str) -> nn.Module:
        """Returns the final model of one training with this seed, in eval mode."""
        return open_model(self.cfg, last_checkpoint(self.folder / step))[0]

    def batch(self, inputs: Tensor) -> Tensor:
        """Returns preprocessed images for the backbone, float32."""
        return self.model.data_preprocessor(dict(inputs=list(inputs), data_samples=None))['inputs']

    def batches(self, inputs: Tensor) -> list[Tensor]:
        """Returns preprocessed images in batches."""
        return [self.batch(part) for part in inputs.split(BATCH)]

    @staticmethod
    def packed(images: Images) -> Iterator[dict[str, Any]]:
        """Yields batches before the data preprocessor."""
        for start in range(0, len(images), BATCH):
            end = start + BATCH
            yield dict(inputs=list(images.inputs[start:end]), data_samples=images.samples[start:end])

    def corrupted(self, images: Images, corruption: str) -> Images:
        """Corrupts images; test images have other random numbers than the images to fit on."""
        seed = 2 * self.seed + (images is self.test)
        return Images(corrupt(images.inputs, corruption, self.severities.get(corruption, 0), seed), images.samples)

    def tests(self) -> dict[str, Images]:
        """Returns the test images by corruption, clean ones first."""
        return {name: self.corrupted(self.test, name) for name in ('clean', *self.severities)}

    def score(self, model: nn.Module, images: Images, evaluator: Evaluator | None = None) -> dict[str, float]:
        """Evaluates a model, and returns the metrics of the experiment in percent by their names in the report.

        Args:
            model: The model.
            images: The images.
            evaluator: Its evaluator; None is that of the test images.
        """
        if self.classifies:
            from mmpretrain.evaluation import Accuracy

            logits = torch.cat([model(batch) for batch in self.batches(images.inputs)])
            accuracy = Accuracy.calculate(logits, images.labels, thrs=(None,))[0][0].item()
            return dict.fromkeys(self.experiment.metrics, accuracy)
        evaluator = evaluator or self.evaluator
        for data in self.packed(images):
            evaluator.process(data_samples=model.test_step(data), data_batch=data)
        with redirect_stdout(None):
            metrics = evaluator.evaluate(len(images))
        return {name: study.METRICS[key][0] * float(metrics[key]) for name, key in self.experiment.metrics.items()}

    def scores(self, models: dict[str, nn.Module], images: Images) -> dict[str, dict[str, float]]:
        """Evaluates several models, see :meth:`score`."""
        return {name: self.score(model, images) for name, model in models.items()}


def path_of(folder: Path, part: str) -> Path:
    """Returns the file of a part of a measurement."""
    return folder / f'robustness-{part}.json'


def read_part(folder: Path, part: str) -> dict[str, Any]:
    """Reads a finished part of a measurement."""
    return json.loads(path_of(folder, part).read_text())


def read_run(folder: Path) -> dict[str, Any]:
    """Returns an entry of ``runs`` of :class:`robustness_report.Result` from all parts of a measurement."""
    rivals, fits = (read_part(folder, part) for part in PARTS)
    table = {corruption: scores | fits['table'][corruption] for corruption, scores in rivals['table'].items()}
    seconds = rivals['cpu_seconds'] + fits['cpu_seconds']
    return rivals | fits | dict(table=table, cpu_seconds=seconds)
