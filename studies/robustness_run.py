"""Measures one model of the robustness study: fits it to corrupted images by several methods and evaluates them."""

import argparse
import copy
import json
import time
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.evaluator import Evaluator
from mmengine.logging import MMLogger
from mmengine.registry import DATASETS
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn

from mmdenoiserep.apis.calibration import layers_of
from mmdenoiserep.apis.config import load_config
from mmdenoiserep.apis.corruptions import make_transform
from mmdenoiserep.apis.model import open_model
from mmdenoiserep.core import (
    InputError,
    apply_denoiserep,
    collect_moments,
    fit_domain,
    fuse_model,
    select_layers,
    solve_denoisers,
)
from mmdenoiserep.core.files.atomic import write_file
from studies import study
from studies.benchmarks.measure import alternate, cost_ratio
from studies.commands import last_checkpoint
from studies.robustness_report import ALL_LAYERS, AS_TRAINED, BATCH_NORM, EARLY_HALF, FIRST_LAYER

CLASSIFICATION = 'fashion-mnist'
SEVERITIES = {
    CLASSIFICATION: dict(noise=0.2, blur=1.2, jpeg=5, contrast=0.3, occlusion=0.4, shot=0.2),
    'scenes': dict(noise=40 / 255, blur=2.0, jpeg=5, contrast=0.5, occlusion=0.4, shot=0.05),
    'fashion-reid': dict(noise=40 / 255, blur=3.5, jpeg=15, contrast=0.8, occlusion=0.4, shot=0.05),
}
"""Severities by data set and corruption, see :func:`corrupt`."""
SOURCE = 4000
"""Largest number of clean training images for the moments in the training domain."""
POOL = {CLASSIFICATION: 6000, 'scenes': 300, 'fashion-reid': 2000}
"""Largest number of other training images, unlabelled and corrupted, to fit on, by data set."""
TARGET = {CLASSIFICATION: 1000}
"""Number of images of the pool that the table uses; other data sets use all of them."""
COUNTS = 8, 32, 128, 512, 2000, 4000
"""Numbers of images of the pool that the curves use."""
SKEWED = 4, 2000
"""Number of classes, and largest number of images, of a target that lacks the other classes."""
MINIMISED = 2000
"""Number of images for entropy minimisation, which takes a step every 200."""
TEST = {CLASSIFICATION: 2500}
"""Largest number of test images; other data sets use all, since their metrics are not means over images."""
RATES = 1e-3, 1e-4
"""Learning rates of entropy minimisation: the original one, and a smaller one."""
RESULT = 'robustness.json'


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
    """All measurements with the baseline of one experiment and one seed.

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
            self.evaluator = Evaluator(cfg.test_evaluator)
        self.evaluator.dataset_meta = tested.metainfo
        chosen = self.order(len(tested))[: TEST.get(experiment.data)]
        self.test = Images.load(tested, chosen.sort().values)
        order = self.order(len(trained))
        count = min(POOL[experiment.data], len(order) // 2)
        self.pool = Images.load(trained, order[:count])
        self.target = self.pool.first(TARGET.get(experiment.data, count))
        self.clean = [
            self.batch(part) for part in Images.load(trained, order[count : count + SOURCE]).inputs.split(500)
        ]
        layers = select_layers(self.model.backbone, 'all', example_input=self.clean[0][:2])
        self.moments = collect_moments(self.model.backbone, layers, self.clean)
        parts = {ALL_LAYERS: 'all', EARLY_HALF: 'early', FIRST_LAYER: 'first'}
        self.fits = {name: list(layers_of(layers, part)) for name, part in parts.items()}

    def order(self, count: int) -> Tensor:
        """Returns a permutation of the numbers below ``count``, drawn from this seed."""
        return torch.randperm(count, generator=torch.Generator().manual_seed(self.seed))

    def trained(self, step: str) -> nn.Module:
        """Returns the final model of one training with this seed, in eval mode."""
        return open_model(self.cfg, last_checkpoint(self.folder / step))[0]

    def batch(self, inputs: Tensor) -> Tensor:
        """Returns preprocessed images for the backbone, float32."""
        return self.model.data_preprocessor(dict(inputs=list(inputs), data_samples=None))['inputs']

    def corrupted(self, images: Images, corruption: str) -> Images:
        """Corrupts images; test images have other random numbers than the images to fit on."""
        seed = 2 * self.seed + (images is self.test)
        return Images(corrupt(images.inputs, corruption, self.severities.get(corruption, 0), seed), images.samples)

    def score(self, model: nn.Module, images: Images) -> dict[str, float]:
        """Evaluates a model, and returns the metrics of the experiment in percent by their names in the report."""
        if self.classifies:
            from mmpretrain.evaluation import Accuracy

            logits = torch.cat([model(self.batch(part)) for part in images.inputs.split(500)])
            accuracy = Accuracy.calculate(logits, images.labels, thrs=(None,))[0][0].item()
            return dict.fromkeys(self.experiment.metrics, accuracy)
        size = self.cfg.test_dataloader.batch_size
        for start in range(0, len(images), size):
            data = dict(
                inputs=list(images.inputs[start : start + size]), data_samples=images.samples[start : start + size]
            )
            self.evaluator.process(data_samples=model.test_step(data), data_batch=data)
        with redirect_stdout(None):
            metrics = self.evaluator.evaluate(len(images))
        return {name: study.METRICS[key][0] * float(metrics[key]) for name, key in self.experiment.metrics.items()}

    def schedule(self) -> nn.Module:
        """Returns the model with the paper's denoisers, solved on the clean images and fused."""
        model = copy.deepcopy(self.model)
        apply_denoiserep(model.backbone, 'all', rank=None, example_input=self.clean[0][:2])
        solve_denoisers(model.backbone, self.clean)
        model.backbone = fuse_model(model.backbone)
        return model

    def fitted(self, inputs: Tensor, layers: Sequence[str]) -> nn.Module:
        """Returns the model with the given layers fitted to images in one batch; see :func:`fit_domain`."""
        model = copy.deepcopy(self.model)
        chosen = {name: model.backbone.get_submodule(name) for name in layers}
        fit_domain(model.backbone, chosen, [self.batch(inputs)], self.moments)
        return model

    def normalised(self, inputs: Tensor) -> nn.Module | None:
        """Returns the model with BatchNorm statistics re-estimated on images; None if it has no BatchNorm."""
        if not any(isinstance(module, _BatchNorm) for module in self.model.modules()):
            return None
        model = copy.deepcopy(self.model)
        update_bn([self.batch(inputs)], model)
        return model

    def minimise_entropy(self, inputs: Tensor, rate: float, size: int = 200) -> nn.Module:
        """Returns the model after one pass of entropy minimisation (TENT, Wang et al. 2021) over images.

        Adam trains only the affine parameters of the norms, and BatchNorm uses the statistics of the batch. Unlike
        TENT, the model is fixed afterwards, and BatchNorm then has the statistics of all images.
        """
        model = copy.deepcopy(self.model).requires_grad_(False)
        norms = [m for m in model.modules() if isinstance(m, nn.LayerNorm | nn.GroupNorm | _BatchNorm)]
        affine = [parameter.requires_grad_() for norm in norms for parameter in norm.parameters(recurse=False)]
        for norm in norms:
            norm.train()
        optimizer = torch.optim.Adam(affine, lr=rate)
        with torch.enable_grad():
            for part in inputs.split(size):
                loss = torch.distributions.Categorical(logits=model(self.batch(part))).entropy().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        model.eval()
        update_bn([self.batch(inputs)], model)
        return model

    def adapted(self, inputs: Tensor) -> dict[str, nn.Module]:
        """Returns the models that each fit, and re-estimated BatchNorm, give for unlabelled images, by method."""
        models = {name: self.fitted(inputs, layers) for name, layers in self.fits.items()}
        if self.classifies and (model := self.normalised(inputs)):
            models[BATCH_NORM] = model
        return models

    def scores(self, models: dict[str, nn.Module], images: Images) -> dict[str, dict[str, float]]:
        """Evaluates several models, see :meth:`score`."""
        return {name: self.score(model, images) for name, model in models.items()}

    def measure(self) -> dict[str, Any]:
        """Runs all measurements, and returns an entry of ``runs`` of :class:`robustness_report.Result`."""
        tests = {name: self.corrupted(self.test, name) for name in ('clean', *self.severities)}
        result = dict(
            images=dict(source=sum(map(len, self.clean)), target=len(self.target), test=len(self.test)),
            table=self.table(tests),
            latency=self.latency(),
        )
        if self.classifies:
            result |= dict(counts=self.counts(tests), skewed=self.skewed(tests), elsewhere=self.elsewhere(tests))
        return result

    def table(self, tests: dict[str, Images]) -> dict[str, dict]:
        """Returns scores by corruption, method and metric; each fit uses the corruption of the test images."""
        fixed = {AS_TRAINED: self.model, 'schedule': self.schedule()}
        if self.classifies:
            fixed |= {'fine-tuned': self.trained('control'), 'fine-tuned on noise': self.trained('noise-augmented')}
        table = {}
        for corruption, test in tests.items():
            inputs = self.corrupted(self.target, corruption).inputs
            models = {**fixed, **self.adapted(inputs)}
            if self.classifies:
                more = self.corrupted(self.pool.first(MINIMISED), corruption).inputs
                models |= {f'entropy, {rate:g}': self.minimise_entropy(more, rate) for rate in RATES}
            table[corruption] = self.scores(models, test)
        return table

    def counts(self, tests: dict[str, Images]) -> dict[str, dict]:
        """Returns scores by number of images, corruption (noise or none), method and metric."""
        result: dict[str, dict] = {}
        for corruption in ('noise', 'clean'):
            inputs = self.corrupted(self.pool.first(max(COUNTS)), corruption).inputs
            for count in (count for count in COUNTS if count <= len(inputs)):
                scores = self.scores(self.adapted(inputs[:count]), tests[corruption])
                result.setdefault(str(count), {})[corruption] = scores
        return result

    def skewed(self, tests: dict[str, Images]) -> dict[str, Any]:
        """Returns the number of images of a target with a few classes, and its scores as in :meth:`counts`."""
        classes, count = SKEWED
        labels = self.pool.labels
        chosen = torch.isin(labels, self.order(int(labels.max()) + 1)[:classes]).nonzero()[:count, 0]
        images = Images(self.pool.inputs[chosen], [self.pool.samples[i] for i in chosen.tolist()])
        scores = {
            corruption: self.scores(self.adapted(self.corrupted(images, corruption).inputs), tests[corruption])
            for corruption in ('noise', 'clean')
        }
        return dict(images=len(images), scores=scores)

    def elsewhere(self, tests: dict[str, Images]) -> dict[str, dict]:
        """Returns scores by domain of the fit, domain of the test, method and metric, for domains that differ."""
        noisy = self.corrupted(self.target, 'noise').inputs
        half = len(noisy) // 2
        domains = {'noise': noisy, 'half noise, half clean': torch.cat([noisy[:half], self.target.inputs[half:]])}
        result = {}
        for name, inputs in domains.items():
            models = self.adapted(inputs)
            result[name] = {
                corruption: self.scores(models, tests[corruption]) for corruption in ('noise', 'blur', 'clean')
            }
        return result

    def latency(self) -> float:
        """Returns the latency of the fitted backbone over the baseline's: the median ratio of alternating pairs."""
        image = self.batch(self.test.inputs[:1])
        models = dict(baseline=self.model, fused=self.fitted(self.target.inputs, self.fits[FIRST_LAYER]))
        seconds = alternate({n: lambda m=m: m.backbone(image) for n, m in models.items()}, warm_up=10, repeats=100)
        return cost_ratio(seconds['fused'], seconds['baseline']).median


def write_noise_config(experiment: study.Experiment, folder: Path) -> str:
    """Writes the config of the control with noise of random strength on every training image; returns its path."""
    cfg = Config.fromfile(experiment.config('_baseline-ft'))
    noise = dict(type='GaussNoise', std_range=(0.0, SEVERITIES[CLASSIFICATION]['noise']), p=1.0)
    cfg.train_dataloader.dataset.pipeline.insert(-1, dict(type='Albumentations', transforms=[noise]))
    path = folder / 'noise-augmented.py'
    cfg.dump(path)
    return str(path)


def measure_one(args: argparse.Namespace) -> None:
    """Measures the trained models of one experiment with one seed, and writes the result."""
    name, seed = args.one[0], int(args.one[1])
    folder = study.seed_folder(args.work_dir, name, seed)
    if not (folder / 'baseline.json').exists():
        raise InputError(f'{folder} has no trained baseline; start this program without --one')
    started = time.process_time()
    torch.set_num_threads(1)
    MMLogger.get_current_instance().setLevel('ERROR')
    experiment = study.EXPERIMENTS[name]
    cfg = load_config(experiment.config(), args.cfg_options)
    with torch.no_grad():
        result = RobustnessRun(experiment, folder, seed, cfg).measure()
    result['cpu_seconds'] = time.process_time() - started
    with write_file(folder / RESULT) as file:
        file.write(json.dumps(result, indent=1).encode())
