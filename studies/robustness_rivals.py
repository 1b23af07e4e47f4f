"""The rivals of the domain fit in the robustness study, without labels and with them."""

import copy
from collections.abc import Iterator
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from mmengine.config import Config
from mmengine.evaluator import Evaluator
from mmengine.optim import CosineAnnealingLR, build_optim_wrapper
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn

from mmdenoiserep.core import apply_denoiserep, fuse_model, solve_denoisers
from studies import study
from studies.rivals import BLIND, FILTERS, BlockAlignment, smooth
from studies.robustness_report import AS_TRAINED, BATCH_NORM, FILTER, LABELLED
from studies.robustness_run import CLASSIFICATION, REID, SEVERITIES, Images, RobustnessRun

CHOOSE = {CLASSIFICATION: 500, 'scenes': 100, REID: 1000}
"""Largest number of labelled images of the pool that a filter is chosen on, by data set."""
MINIMISED = 2000
"""Number of images for entropy minimisation, which takes a step every 200."""
RATE = 1e-3
"""Learning rate of entropy minimisation, the original one; a tenth of it gained less in a first study."""
ITERATIONS = 150
"""Length of the fine-tuning with labels."""
LOADING = Lock()
"""mmengine cannot read two configs at once in two threads."""


class RivalsRun(RobustnessRun):
    """Measures the rivals.

    Args:
        args: See :class:`RobustnessRun`.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.choose = self.pool.first(CHOOSE[self.experiment.data])
        self.training_evaluator = self.make_training_evaluator()
        self.blocks = BlockAlignment.measure(self.model.backbone, self.batches(self.clean))

    def measure(self) -> dict[str, Any]:
        """Measures everything but the domain fit; see :class:`robustness_report.Result`."""
        tests = self.tests()
        filters = {name: self.choose_filter(name) for name in tests}
        images = dict(source=len(self.clean), target=len(self.target), test=len(self.test))
        return dict(images=images, filters=filters, table=self.table(tests, filters))

    def choose_filter(self, corruption: str) -> str:
        """Returns the filter with the best score of the model as trained on labelled training images."""
        images = self.corrupted(self.choose, corruption)
        scores = {}
        for name in FILTERS:
            smoothed = Images(smooth(images.inputs, name), images.samples)
            scores[name] = next(iter(self.score(self.model, smoothed, self.training_evaluator).values()))
        return max(scores, key=lambda name: scores[name])

    def table(self, tests: dict[str, Images], filters: dict[str, str]) -> dict[str, dict]:
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

    def schedule(self) -> nn.Module:
        """Returns the model with the paper's denoisers, solved on the clean images and fused."""
        model = copy.deepcopy(self.model)
        batches = self.batches(self.clean)
        apply_denoiserep(model.backbone, 'all', rank=None, example_input=batches[0][:2])
        solve_denoisers(model.backbone, batches)
        model.backbone = fuse_model(model.backbone)
        return model

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

    def make_training_evaluator(self) -> Evaluator:
        """Returns the evaluator of the labelled training images that a filter is chosen on."""
        config, train = dict(self.cfg.test_evaluator), self.cfg.train_dataloader.dataset
        if 'ann_file' in config:
            config['ann_file'] = train['data_root'] + train['ann_file']
        evaluator = self.make_evaluator(config, self.evaluator.dataset_meta)
        if 'ann_file' in config:
            evaluator.metrics[0].img_ids = [sample.img_id for sample in self.choose.samples]
        if self.experiment.data == REID:
            for i, sample in enumerate(self.choose.samples):
                sample.set_metainfo(dict(is_query=i % 5 == 0))
        return evaluator


def write_noise_config(experiment: study.Experiment, folder: Path) -> str:
    """Writes the config of the control with noise of random strength on every training image; returns its path."""
    with LOADING:
        cfg = Config.fromfile(experiment.config('_baseline-ft'))
    noise = dict(type='GaussNoise', std_range=(0.0, SEVERITIES[CLASSIFICATION]['noise']), p=1.0)
    cfg.train_dataloader.dataset.pipeline.insert(-1, dict(type='Albumentations', transforms=[noise]))
    path = folder / 'noise-augmented.py'
    cfg.dump(path)
    return str(path)
