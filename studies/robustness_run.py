"""Measures one model of the robustness study: fits it to corrupted images by several methods and evaluates them."""

import argparse
import copy
import json
import time
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import torch
from mmengine.config import Config
from mmengine.evaluator import Evaluator
from mmengine.logging import MMLogger
from mmengine.optim import CosineAnnealingLR, build_optim_wrapper
from mmengine.registry import DATASETS
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn

from mmdenoiserep.apis.calibration import Extractor
from mmdenoiserep.apis.config import load_config
from mmdenoiserep.apis.corruptions import make_transform
from mmdenoiserep.apis.gate import layers_of
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
from mmdenoiserep.core.calibration.moments import Moments
from mmdenoiserep.core.files.atomic import write_file
from studies import study
from studies.benchmarks.measure import alternate, cost_ratio
from studies.commands import last_checkpoint
from studies.rivals import BLIND, FILTERS, NO_FILTER, BlockAlignment, smooth
from studies.robustness_report import (
    ALL_LAYERS,
    AS_TRAINED,
    BATCH_NORM,
    EARLY_HALF,
    FILTER,
    FIRST_LAYER,
    LABELLED,
)

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
FITS = {ALL_LAYERS: 'all', EARLY_HALF: 'early', FIRST_LAYER: 'first'}
"""The layers of each fit, see :func:`mmdenoiserep.apis.gate.layers_of`."""
SOURCE = 4000
"""Largest number of clean training images for the moments in the training domain."""
POOL = {CLASSIFICATION: 3000, 'scenes': 300, REID: 2000}
"""Largest number of other training images, corrupted, to choose from, by data set."""
TARGET = 1000
"""Largest number of images of the pool that the table uses, to fit on and to fine-tune on with labels."""
COUNTS = 32, 128
"""Smaller numbers of images to fit on."""
SKEWED = 4, 1000
"""Number of classes, and largest number of images, of a target that lacks the other classes."""
CHOOSE = {CLASSIFICATION: 500, 'scenes': 100, REID: 1000}
"""Largest number of labelled images of the pool that a filter is chosen on, by data set."""
MINIMISED = 2000
"""Number of images for entropy minimisation, which takes a step every 200."""
TEST = {CLASSIFICATION: 2500}
"""Largest number of test images; other data sets use all, since their metrics are not means over images."""
RATE = 1e-3
"""Learning rate of entropy minimisation, the original one; a tenth of it gained less in a first study."""
ITERATIONS = 150
"""Length of the fine-tuning with labels."""
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
        chosen = self.order(len(tested))[: TEST.get(experiment.data)]
        self.test = Images.load(tested, chosen.sort().values)
        order = self.order(len(trained))
        count = min(POOL[experiment.data], len(order) // 2)
        self.pool = Images.load(trained, order[:count])
        self.target = self.pool.first(TARGET)
        self.choose = self.pool.first(CHOOSE[experiment.data])
        self.clean = Images.load(trained, order[count : count + SOURCE]).inputs
        self.evaluator = self.make_evaluator(cfg.test_evaluator, tested.metainfo)
        self.training_evaluator = self.training_evaluator_of(train, tested.metainfo)
        self.moments: dict[str, dict[str, Moments]] = {}
        self.blocks = BlockAlignment.measure(self.model.backbone, self.batches(self.clean))

    @staticmethod
    def make_evaluator(config: dict, metainfo: dict) -> Evaluator:
        """Returns an evaluator of a data set with some metainfo."""
        with redirect_stdout(None):
            evaluator = Evaluator(config)
        evaluator.dataset_meta = metainfo
        return evaluator

    def training_evaluator_of(self, train: dict, metainfo: dict) -> Evaluator:
        """Returns the evaluator of the labelled training images that a filter is chosen on."""
        config = dict(self.cfg.test_evaluator)
        if 'ann_file' in config:
            config['ann_file'] = train['data_root'] + train['ann_file']
        evaluator = self.make_evaluator(config, metainfo)
        if 'ann_file' in config:
            evaluator.metrics[0].img_ids = [sample.img_id for sample in self.choose.samples]
        if self.experiment.data == REID:
            for i, sample in enumerate(self.choose.samples):
                sample.set_metainfo(dict(is_query=i % 5 == 0))
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

    def corrupted(self, images: Images, corruption: str) -> Images:
        """Corrupts images; test images have other random numbers than the images to fit on."""
        seed = 2 * self.seed + (images is self.test)
        return Images(corrupt(images.inputs, corruption, self.severities.get(corruption, 0), seed), images.samples)

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
        for start in range(0, len(images), BATCH):
            end = start + BATCH
            data = dict(inputs=list(images.inputs[start:end]), data_samples=images.samples[start:end])
            evaluator.process(data_samples=model.test_step(data), data_batch=data)
        with redirect_stdout(None):
            metrics = evaluator.evaluate(len(images))
        return {name: study.METRICS[key][0] * float(metrics[key]) for name, key in self.experiment.metrics.items()}

    def schedule(self) -> nn.Module:
        """Returns the model with the paper's denoisers, solved on the clean images and fused."""
        model = copy.deepcopy(self.model)
        batches = self.batches(self.clean)
        apply_denoiserep(model.backbone, 'all', rank=None, example_input=batches[0][:2])
        solve_denoisers(model.backbone, batches)
        model.backbone = fuse_model(model.backbone)
        return model

    def source(self, smoothing: str) -> dict[str, Moments]:
        """Returns the moments of backbone and neck on the clean images, all smoothed by a filter."""
        if smoothing not in self.moments:
            part, batches = Extractor.of(self.model, 'backbone'), self.batches(smooth(self.clean, smoothing))
            layers = select_layers(part, 'all', example_input=batches[0][:2])
            self.moments[smoothing] = collect_moments(part, layers, batches)
        return self.moments[smoothing]

    def fitted(self, inputs: Tensor, layers: str, smoothing: str = NO_FILTER) -> nn.Module:
        """Returns the model fitted to images.

        Args:
            inputs: The images, smoothed already.
            layers: The layers to fit, see :data:`FITS`.
            smoothing: Filter of the images; the source moments are those of clean images behind the same filter.
        """
        model, source = copy.deepcopy(self.model), self.source(smoothing)
        part = Extractor.of(model, 'backbone')
        chosen = layers_of({name: part.get_submodule(name) for name in source}, layers)
        fit_domain(part, chosen, self.batches(inputs), source)
        return model

    def fitted_parts(self, inputs: Tensor) -> dict[str, nn.Module]:
        """Returns the models that each fit gives for unlabelled images, by method."""
        return {name: self.fitted(inputs, layers) for name, layers in FITS.items()}

    def normalised(self, inputs: Tensor) -> nn.Module | None:
        """Returns the model with BatchNorm statistics re-estimated on images; None if it has no BatchNorm."""
        if not any(isinstance(module, _BatchNorm) for module in self.model.modules()):
            return None
        model = copy.deepcopy(self.model)
        update_bn([self.batch(inputs)], model)
        return model

    def minimise_entropy(self, inputs: Tensor, size: int = 200) -> nn.Module:
        """Returns the model after one pass of entropy minimisation (TENT, Wang et al. 2021) over images.

        Adam trains only the affine parameters of the norms, and BatchNorm uses the statistics of the batch. Unlike
        TENT, the model is fixed afterwards, and BatchNorm then has the statistics of all images.
        """
        model = copy.deepcopy(self.model).requires_grad_(False)
        norms = [m for m in model.modules() if isinstance(m, nn.LayerNorm | nn.GroupNorm | _BatchNorm)]
        affine = [parameter.requires_grad_() for norm in norms for parameter in norm.parameters(recurse=False)]
        for norm in norms:
            norm.train()
        optimizer = torch.optim.Adam(affine, lr=RATE)
        with torch.enable_grad():
            for part in inputs.split(size):
                loss = torch.distributions.Categorical(logits=model(self.batch(part))).entropy().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        model.eval()
        update_bn([self.batch(inputs)], model)
        return model

    def fine_tuned(self, images: Images) -> nn.Module:
        """Returns the model fine-tuned on images with their labels, as the experiment's control but shorter."""
        cfg = Config.fromfile(self.experiment.config('_baseline-ft'))
        model = copy.deepcopy(self.model).train()
        optimizer = build_optim_wrapper(model, cfg.optim_wrapper)
        rate = CosineAnnealingLR(optimizer, T_max=ITERATIONS, eta_min=cfg.param_scheduler[0].eta_min, by_epoch=False)
        torch.manual_seed(self.seed)  # detectors sample boxes
        batches = self.training_batches(images, cfg.train_dataloader.batch_size)
        with torch.enable_grad():
            for _, chosen in zip(range(ITERATIONS), batches, strict=False):
                samples = copy.deepcopy([images.samples[i] for i in chosen.tolist()])  # training changes them
                model.train_step(dict(inputs=list(images.inputs[chosen]), data_samples=samples), optimizer)
                rate.step()
        return model.eval()

    def training_batches(self, images: Images, size: int) -> Iterator[Tensor]:
        """Yields the numbers of the images of each training batch, without end."""
        generator = torch.Generator().manual_seed(self.seed)
        while True:
            order = torch.randperm(len(images), generator=generator)
            if self.experiment.data == REID:  # images of one identity follow each other, for the triplet loss
                labels = images.labels[order]
                order = order[torch.rand(int(labels.max()) + 1, generator=generator)[labels].argsort()]
            yield from order.split(size)

    def scores(self, models: dict[str, nn.Module], images: Images) -> dict[str, dict[str, float]]:
        """Evaluates several models, see :meth:`score`."""
        return {name: self.score(model, images) for name, model in models.items()}

    def rivals(self) -> dict[str, Any]:
        """Measures everything but the domain fit."""
        tests = {name: self.corrupted(self.test, name) for name in ('clean', *self.severities)}
        filters = {name: self.choose_filter(name) for name in tests}
        images = dict(source=len(self.clean), target=len(self.target), test=len(self.test))
        return dict(images=images, filters=filters, table=self.rivals_table(tests, filters))

    def fits(self, filters: dict[str, str]) -> dict[str, Any]:
        """Measures the domain fit.

        Args:
            filters: The chosen filter by corruption.
        """
        tests = {name: self.corrupted(self.test, name) for name in ('clean', *self.severities)}
        result = dict(table=self.fits_table(tests, filters), latency=self.latency(), counts=self.counts(tests))
        if self.classifies:
            result |= dict(skewed=self.skewed(tests), elsewhere=self.elsewhere(tests))
        return result

    def choose_filter(self, corruption: str) -> str:
        """Returns the filter with the best score of the model as trained on labelled training images."""
        images = self.corrupted(self.choose, corruption)
        scores = {}
        for name in FILTERS:
            smoothed = Images(smooth(images.inputs, name), images.samples)
            scores[name] = next(iter(self.score(self.model, smoothed, self.training_evaluator).values()))
        return max(scores, key=lambda name: scores[name])

    def rivals_table(self, tests: dict[str, Images], filters: dict[str, str]) -> dict[str, dict]:
        """Returns scores by corruption, method and metric; each method gets the corruption of the test images."""
        fixed = {AS_TRAINED: self.model, 'schedule': self.schedule()}
        if self.classifies:
            fixed |= {'fine-tuned': self.trained('control'), 'fine-tuned on noise': self.trained('noise-augmented')}
        table = {}
        for corruption, test in tests.items():
            target, models = self.corrupted(self.target, corruption), dict(fixed)
            if self.classifies:
                if model := self.normalised(target.inputs):
                    models[BATCH_NORM] = model
                models['entropy'] = self.minimise_entropy(self.corrupted(self.pool.first(MINIMISED), corruption).inputs)
            models['block alignment'] = copy.deepcopy(self.model)
            models['block alignment'].backbone = BlockAlignment(self.model.backbone, self.blocks)
            scores = self.scores(models, test)
            for name, smoothing in {'filter, blind': BLIND, FILTER: filters[corruption]}.items():
                scores[name] = self.score(self.model, Images(smooth(test.inputs, smoothing), test.samples))
            scores[LABELLED] = self.score(self.fine_tuned(target), test)
            table[corruption] = scores
        return table

    def fits_table(self, tests: dict[str, Images], filters: dict[str, str]) -> dict[str, dict]:
        """Returns scores by corruption, method and metric; each fit gets the corruption of the test images."""
        table = {}
        for corruption, test in tests.items():
            inputs, chosen = self.corrupted(self.target, corruption).inputs, filters[corruption]
            scores = self.scores(self.fitted_parts(inputs), test)
            model = self.fitted(smooth(inputs, chosen), 'all', chosen)
            smoothed = Images(smooth(test.inputs, chosen), test.samples)
            table[corruption] = {**scores, f'{FILTER} + all layers': self.score(model, smoothed)}
        return table

    def counts(self, tests: dict[str, Images]) -> dict[str, dict]:
        """Returns scores by number of images, corruption (noise or none), method and metric."""
        result: dict[str, dict] = {}
        for corruption in ('noise', 'clean'):
            inputs = self.corrupted(self.target, corruption).inputs
            for count in (count for count in COUNTS if count < len(inputs)):
                scores = self.scores(self.fitted_parts(inputs[:count]), tests[corruption])
                result.setdefault(str(count), {})[corruption] = scores
        return result

    def skewed(self, tests: dict[str, Images]) -> dict[str, Any]:
        """Returns the number of images of a target with a few classes, and its scores as in :meth:`counts`."""
        classes, count = SKEWED
        labels = self.pool.labels
        chosen = torch.isin(labels, self.order(int(labels.max()) + 1)[:classes]).nonzero()[:count, 0]
        images = Images(self.pool.inputs[chosen], [self.pool.samples[i] for i in chosen.tolist()])
        scores = {
            corruption: self.scores(self.fitted_parts(self.corrupted(images, corruption).inputs), tests[corruption])
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
            models = self.fitted_parts(inputs)
            result[name] = {
                corruption: self.scores(models, tests[corruption]) for corruption in ('noise', 'blur', 'clean')
            }
        return result

    def latency(self) -> float:
        """Returns the latency of the fitted backbone over the baseline's: the median ratio of alternating pairs."""
        image = self.batch(self.test.inputs[:1])
        models = dict(baseline=self.model, fused=self.fitted(self.target.inputs, FITS[FIRST_LAYER]))
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
    """Measures one part for the trained models of one experiment with one seed, and writes the result."""
    name, seed, part = args.one[0], int(args.one[1]), args.one[2]
    folder = study.seed_folder(args.work_dir, name, seed)
    if not (folder / 'baseline.json').exists():
        raise InputError(f'{folder} has no trained baseline; start this program without --one')
    started = time.process_time()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    MMLogger.get_current_instance().setLevel('ERROR')
    experiment = study.EXPERIMENTS[name]
    cfg = load_config(experiment.config(), args.cfg_options)
    with torch.no_grad():
        run = RobustnessRun(experiment, folder, seed, cfg)
        result = run.rivals() if part == 'rivals' else run.fits(read_part(folder, 'rivals')['filters'])
    result['cpu_seconds'] = time.process_time() - started
    with write_file(path_of(folder, part)) as file:
        file.write(json.dumps(result, indent=1).encode())


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
