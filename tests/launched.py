"""What the configs of test_launchers.py import: a process that is killed, and a metric of all images."""

import os
import signal

from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.registry import HOOKS, METRICS

import engine_helpers  # noqa: F401  (registers the tiny model and its data)


@HOOKS.register_module()
class KillSecondProcess(Hook):
    """Kills process 1 of several, without a warning, after so many iterations."""

    def __init__(self, iterations):
        self.iterations = iterations

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.rank == 1 and runner.iter + 1 == self.iterations:
            os.kill(os.getpid(), signal.SIGKILL)


@METRICS.register_module()
class MeanOutput(BaseMetric):
    """The number of images and the mean of what the model puts out for them."""

    def process(self, data_batch, data_samples):
        self.results += [float(outputs.mean()) for outputs in data_samples]

    def compute_metrics(self, results):
        return dict(images=float(len(results)), mean=sum(results) / len(results))
