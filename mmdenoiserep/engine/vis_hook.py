"""Shows the denoisers of a training run, layer by layer."""

from mmengine.dist import master_only
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS
from mmengine.visualization import TensorboardVisBackend
from torch import Tensor

from ..core import DenoiseLayer
from ..core.calibration.solve import denoised_layers


@HOOKS.register_module()
class DenoiseVisHook(Hook):
    """Hands the size of every correction ``B x + b~`` to the visualizer of the runner, and to TensorBoard all of it.

        ``denoiser/<layer>/norm_B``  scalar: ``|B|_F / sqrt(C)``, relative to the identity in ``x' = x - (B x + b~)``
        ``denoiser/<layer>/norm_b``  scalar: ``|b~|``, in the units of the layer's input; where there is a bias
        ``denoiser/<layer>/B``       histogram: the entries of B, without the zeros between groups
        ``denoiser/<layer>/b``       histogram: the entries of b~

    Histograms need ``vis_backends=[dict(type='LocalVisBackend'), dict(type='TensorboardVisBackend')]`` in the
    visualizer of the config; scalars go to any backend.

    Args:
        interval: Iterations from one time to the next.

    Raises:
        ValueError: At the start of the training: no denoised layer in the model.
    """

    def __init__(self, interval: int = 100) -> None:
        self.interval = interval

    def before_train(self, runner) -> None:
        """Finds the layers."""
        model = runner.model.module if is_model_wrapper(runner.model) else runner.model
        self.layers = denoised_layers(model)

    @master_only
    def after_train_iter(self, runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        """Shows all layers, every ``interval`` iterations."""
        if not self.every_n_train_iters(runner, self.interval):
            return
        step = runner.iter + 1  # as mmengine's LoggerHook counts
        boards = [b for b in runner.visualizer._vis_backends.values() if isinstance(b, TensorboardVisBackend)]
        for name, layer in self.layers.items():
            for part, (size, values) in _parts(layer).items():
                runner.visualizer.add_scalar(f'denoiser/{name}/norm_{part}', size, step)
                for board in boards if values.isfinite().all() else []:  # NaN has no histogram
                    board.experiment.add_histogram(f'denoiser/{name}/{part}', values, step)


def _parts(layer: DenoiseLayer) -> dict[str, tuple[float, Tensor]]:
    """Returns B and, where there is one, b~: its size, and its values."""
    matrix = layer.denoiser.matrix().detach().float()  # (groups, C/g, C/g)
    channels = matrix.shape[0] * matrix.shape[1]
    parts = {'B': (matrix.norm().item() / channels**0.5, matrix)}
    if layer.denoiser.bias is not None:
        bias = layer.denoiser.bias.detach().float()
        parts['b'] = bias.norm().item(), bias
    return parts
