"""Keeps a fused copy beside every checkpoint that a run keeps."""

from contextlib import suppress
from pathlib import Path

from mmengine.dist import master_only
from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import find_latest_checkpoint

from ..core import CheckpointError, fuse_checkpoint


@HOOKS.register_module()
class DenoiseFusionHook(Hook):
    """Writes ``epoch_3_fused.pth`` beside ``epoch_3.pth``: the same weights for the config without denoising.

    It reads the files that CheckpointHook has just written (the last and the best ones) and fuses those, so the live
    model is never touched, and a run with averaged weights (EMAHook) gets averaged fused weights. When CheckpointHook
    removes a checkpoint, its fused copy goes too. A checkpoint that can't be fused is an error in the log, and the
    training goes on. Only local files of the main process are handled.
    """

    priority = 'LOWEST'  # after CheckpointHook, which is VERY_LOW

    def before_train(self, runner) -> None:
        """Finds the fused copies of an earlier part of the run."""
        self.fused: dict[Path, tuple[int, int]] = {}
        resumed = runner._resume  # of a FlexibleRunner, perhaps the path
        if resumed and not isinstance(resumed, str):
            resumed = runner._load_from or find_latest_checkpoint(runner.work_dir)
        if resumed:
            for source in Path(resumed).parent.glob('*.pth'):
                if _fused_path(source).exists():
                    self.fused[source] = _version(source)

    def after_train_iter(self, runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        """Follows a CheckpointHook that counts iterations."""
        self._follow(runner)

    def after_train_epoch(self, runner) -> None:
        """Follows a CheckpointHook that counts epochs."""
        self._follow(runner)

    def after_val_epoch(self, runner, metrics=None) -> None:
        """Follows a new best checkpoint."""
        if hasattr(self, 'fused'):  # not in a validation without training
            self._follow(runner)

    @master_only
    def _follow(self, runner) -> None:
        infos = runner.message_hub.runtime_info
        for key in [key for key in infos if key == 'last_ckpt' or key.startswith('best_ckpt')]:
            source = Path(str(infos[key]))
            if source.is_file() and self.fused.get(source) != _version(source):
                self.fused[source] = _version(source)
                try:
                    fuse_checkpoint(source, _fused_path(source), overwrite=True)
                except CheckpointError as error:
                    _remove_fused(source)  # what an earlier file of that name left
                    runner.logger.error(f'no fused copy: {error}')
                else:
                    runner.logger.info(f'Fused copy for the config without denoising: {_fused_path(source)}')
        for source in [source for source in self.fused if not source.exists()]:
            del self.fused[source]
            _remove_fused(source)


def _fused_path(source: Path) -> Path:
    return source.with_name(f'{source.stem}_fused{source.suffix}')


def _remove_fused(source: Path) -> None:
    with suppress(OSError):  # nothing to stop a training for
        _fused_path(source).unlink(missing_ok=True)


def _version(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_mtime_ns, status.st_size
