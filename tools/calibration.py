"""The three modes of tools/calibrate.py."""

import argparse
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass

import torch
from mmengine.config import Config
from mmengine.dist import get_rank, get_world_size
from torch import Tensor, nn
from tqdm import tqdm

import verify
from calibration_report import LARGE, draw_spectra, verify_maps, warnings_of
from launch import stop
from mmdenoiserep.apis.backbones import check_input, denoised_configs, predicting_backbone
from mmdenoiserep.apis.images import Batches, open_images, spread
from mmdenoiserep.core import (
    CalibrationReport,
    CheckpointError,
    Moments,
    apply_denoiserep,
    calibrate,
    collect_moments,
    evaluating,
    fingerprint,
    fuse_model,
    fuse_state_dict,
    load_moments,
    safe_fit,
    save_moments,
)
from mmdenoiserep.core.files.checkpoint import STAMP, write_atomically
from mmdenoiserep.core.files.config_text import vanilla_text
from mmdenoiserep.core.calibration.collect import denoised_layers, sum_processes
from mmdenoiserep.core.method.probe import run_model
from mmdenoiserep.core.calibration.safety import early_half
from mmdenoiserep.core.calibration.match import RANKED
from opening import build, load, load_strictly, to_device
from outputs import written_whole

MEMORY = 4.0
"""GiB that the features may take, unless something else is asked for."""
SPLITS = {'schedule': 'train', 'moments': 'train', 'domain': 'test'}
"""The data set of the config that each mode reads if nothing else is asked for."""


class Calibration:
    """A model with the images to calibrate it on.

    Args:
        args: The command line of tools/calibrate.py.
        cfg: The config.

    Raises:
        CheckpointError: A file can't be read, or does not fit the config.
    """

    def __init__(self, args: argparse.Namespace, cfg: Config) -> None:
        self.args = args
        self.cfg = cfg
        if args.mode == 'schedule' and not denoised_configs(cfg.get('model')):
            stop(
                f'{args.config} has no DenoiseRepBackbone, which --mode schedule needs; '
                'wrap the backbone as docs/own-model.md shows'
            )
        how = dict(denoisers='keep' if args.mode == 'schedule' else 'fold', allow_pickle=args.allow_pickle)
        self.model, self.meta = load(cfg, args.config, args.checkpoint, **how)
        if args.mode == 'schedule' and STAMP in self.meta:
            stop(f'{args.checkpoint} is fused already; take the vanilla checkpoint that its training began with')
        self.name = predicting_backbone(self.model)
        saved = self.model.state_dict()
        if lost := [name for name, _ in self.model.named_parameters() if name not in saved]:
            stop(
                f'a state dict of the model of {args.config} leaves out {lost[0]} and {len(lost) - 1} others (LoRA?), '
                'so what is fitted to them would be lost; merge the adapters into the weights first'
            )
        self.weights = fingerprint(self.backbone.state_dict())
        to_device(self.model, args.device)
        self.images = self._open_images()
        self.example = next(iter(self.images))[:1]
        check_input(self.model, self.name, self.example)
        if args.mode != 'schedule':
            apply_denoiserep(self.backbone, 'all', example_input=self.example)
        self.layers = list(denoised_layers(self.backbone))

    @property
    def backbone(self) -> nn.Module:
        """The part that is calibrated."""
        return self.model.get_submodule(self.name)

    @property
    def total(self) -> int:
        """Number of images of all processes, less those that were left out so far."""
        total = min(self.args.num_images, len(self.images.dataset.dataset))
        return total - sum_processes(len(self.images.left_out))

    def _open_images(self) -> Batches:
        args = self.args
        split = args.split or SPLITS[args.mode]
        if not args.images and not self.cfg.get(f'{split}_dataloader'):
            stop(f'{args.config} has no {split}_dataloader; name a folder with --images')
        dataset = open_images(self.cfg, split, args.images, self.model)
        loader = None if args.images else self.cfg[f'{split}_dataloader']
        workers = loader.get('num_workers', 0) if isinstance(loader, Mapping) else 0
        share = spread(dataset, args.num_images, get_rank(), get_world_size())
        if not len(share):
            stop('there are fewer images than processes')
        return Batches(self.model, share, args.batch_size, workers)

    def schedule(self) -> None:
        """Sets the denoisers to the optimum of their loss and writes the denoised checkpoint."""
        every = self.args.every or choose_every(measure_flows(self.backbone, self.layers, self.example), self.total)
        with counted(self.images, 1) as batches:
            report = calibrate(self.backbone, batches, 'schedule', prior=self.args.prior or 0.0, every=every)
        state = self.model.cpu().state_dict()
        if self.args.verify:
            pair = verify.build_both(self.cfg, self.args.config)
            verify.compare(*pair, state, fuse_state_dict(state), self.args.checkpoint)
        self._finish(report, state, every)

    def moments(self) -> None:
        """Gathers the moments of all layers and writes them."""
        every = self.args.every or choose_every(measure_flows(self.backbone, self.layers, self.example), self.total)
        with counted(self.images, 1) as batches:
            moments = collect_moments(self.backbone, batches, every=every)
        reached, total = sum(seen.count > 0 for seen in moments.values()), self.total
        print(f'moments of {reached} layers from {total:,} images, one in {every} of their vectors')
        if self.args.dry_run or get_rank():
            return
        save_moments(moments, self.args.output, dict(weights=self.weights, images=total, every=every))
        print(f'{self.args.output} is what --mode domain takes as --source')

    def domain(self) -> None:
        """Fits the backbone to the images and writes the vanilla checkpoint."""
        args = self.args
        source, about = load_moments(args.source)
        if about.get('weights') != self.weights:
            raise CheckpointError(
                f'{args.source} was gathered with other weights than {args.checkpoint}; gather it again'
            )
        options = safe_fit(self.layers, self.total, args.representative)
        if args.layers:
            parts = dict(first=self.layers[:1], early=early_half(self.layers), all=self.layers)
            options['layers'] = tuple(parts[args.layers])
        options |= {key: getattr(args, key) for key in ('fit', 'prior') if getattr(args, key) is not None}
        if args.rank is not None:
            options['rank'] = args.rank or None
        if options['fit'] not in RANKED:
            options['rank'] = None
        flows = measure_flows(self.backbone, options['layers'], self.example)
        every = args.every or choose_every(flows, self.total)
        before = deepcopy(self.backbone) if args.verify else None
        passes = len(options['layers'])
        if fits_memory(flows, len(self.images.dataset), MEMORY if args.memory is None else args.memory):
            with counted(self.images, 1) as batches:
                whole = list(batches)
            if len({batch.shape[1:] for batch in whole}) == 1:
                whole = [torch.cat(whole)]
            fit_on = nullcontext(whole)
        else:
            fit_on = counted(self.images, passes)
        with fit_on as batches:
            report = calibrate(self.backbone, batches, 'domain', source, every=every, **options)
        first = report.layers[0]
        if not (args.representative or args.layers or args.fit) and first.moved > LARGE:
            raise CheckpointError(
                f'{first.name} would move by {first.moved:.2f} times its variance, which looks like another data set '
                'or very different light; look at the images, and if they are right, say what may change with '
                '--representative, or with --layers and --fit'
            )
        self.model.set_submodule(self.name, fuse_model(self.backbone))
        if before is not None:
            self._verify(before, report)
        chosen = {key: value for key, value in options.items() if key != 'layers'}
        self.meta[STAMP] = dict(fused=True, layers=len(report.layers), mode='domain', images=report.images, **chosen)
        if 'cfg' not in self.meta:  # for the libraries' inferencers
            self.meta['cfg'] = vanilla_text(self.cfg.pretty_text)
        self._finish(report, self.model.cpu().state_dict(), every, source)

    def _verify(self, before: nn.Module, report: CalibrationReport) -> None:
        """Compares the new weights with the old ones and the maps as layers of their own; raises if they differ."""
        images = torch.cat([self.example, torch.randn_like(self.example)])
        result = verify_maps(before, self.backbone, report, images)
        print(f'an image and noise, maps as layers of their own against maps in the weights:\n{result}')
        if not result.ok:
            raise CheckpointError(f'{self.args.checkpoint}: the maps do not fold into the weights; nothing was written')
        load_strictly(
            build(self.cfg, self.args.config, denoised=False), self.model.state_dict(), str(self.args.output), 'vanilla'
        )
        print('the config without denoising takes exactly these weights')

    def _finish(
        self,
        report: CalibrationReport,
        state: Mapping[str, Tensor],
        every: int,
        source: Mapping[str, Moments] | None = None,
    ) -> None:
        """Prints the report, and writes checkpoint and picture; one process does."""
        if get_rank():
            return
        print(report)
        print(f'one in {every} of their vectors was taken')
        for sentence in warnings_of(report, self.layers):
            print(f'warning: {sentence}')
        if self.args.dry_run:
            print('nothing was written (--dry-run)')
            return
        with written_whole(self.args.plot) as file:
            draw_spectra(report, file, source)
            file.flush()  # a full disk shows before the checkpoint is there
            write_atomically(dict(meta=self.meta, state_dict=state), self.args.output)
        loads = 'the config without denoising' if report.mode == 'domain' else self.args.config
        print(f'{self.args.output} loads into {loads}; spectra: {self.args.plot}')


@dataclass(frozen=True)
class Flow:
    """What one image sends through a layer, in or out.

    Attributes:
        channels: C.
        vectors: Number of its vectors (tokens, pixels).
        bytes: Their size.
    """

    channels: int
    vectors: int
    bytes: int


def measure_flows(backbone: nn.Module, layers: Iterable[str], image: Tensor) -> list[Flow]:
    """Returns what an image, (1, C, H, W), sends into and out of some layers."""
    flows = []

    def note(layer: nn.Module, args: tuple, output: Tensor) -> None:
        for x in (args[0], output):
            channels = x.shape[-3] if isinstance(layer, nn.Conv2d) else x.shape[-1]
            flows.append(Flow(channels, x.numel() // channels, x.numel() * x.element_size()))

    handles = [backbone.get_submodule(name).register_forward_hook(note) for name in layers]
    try:
        with evaluating(backbone):
            run_model(backbone, image)
    finally:
        for handle in handles:
            handle.remove()
    return flows


def choose_every(flows: Sequence[Flow], images: int) -> int:
    """Returns which share of the vectors is enough: one in so many, at most 16, but ten for each channel."""
    return max(1, min([16, *(images * flow.vectors // (10 * flow.channels) for flow in flows)]))


def fits_memory(flows: Sequence[Flow], images: int, gibibytes: float) -> bool:
    """Whether a forward of all images at once takes about so much: at its peak, four times the largest flow."""
    return 4 * images * max((flow.bytes for flow in flows), default=0) <= gibibytes * 2**30


@contextmanager
def counted(images: Batches, passes: int) -> Iterator[Iterable[Tensor]]:
    """Gives the batches with a progress bar over the images of all passes."""
    with tqdm(total=passes * len(images.dataset), unit='image', disable=get_rank() != 0) as bar:
        yield CountedBatches(images, bar)


class CountedBatches:
    """Batches that move a bar whenever they are read."""

    def __init__(self, images: Batches, bar: tqdm) -> None:
        self.images = images
        self.bar = bar

    def __iter__(self) -> Iterator[Tensor]:
        for batch in self.images:
            yield batch
            self.bar.update(len(batch))
        self.bar.update(len(self.images.dataset) - len(self.images.order))  # left out
