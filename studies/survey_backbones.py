"""Tries DenoiseRep on every backbone class that mmdet, mmseg and mmpretrain register, and writes docs/backbones.md."""

import argparse
import contextlib
import copy
import importlib
import inspect
import logging
import multiprocessing
import os
import re
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from denoiserep_commands import launch
from mmdenoiserep.core import InputError

LIBRARIES = ('mmdet', 'mmseg', 'mmpretrain')
PAGE = Path(__file__).resolve().parents[1] / 'docs' / 'backbones.md'
RANK = 4
TOLERANCE = 1e-9

SMALL_VIT = dict(embed_dims=192, num_layers=12, num_heads=3)
ARGUMENTS: dict[str, dict[str, Any]] = {
    'mmdet.DetectoRS_ResNeXt': dict(depth=50, groups=32, base_width=4),
    'mmdet.HourglassNet': dict(downsample_times=2, stage_channels=(64, 64, 96), stage_blocks=(1, 1, 1)),
    'mmdet.ResNetV1d': dict(depth=50),
    'mmseg.BEiT': SMALL_VIT,
    'mmseg.DeconvModule': dict(in_channels=8, out_channels=4),
    'mmseg.InterpConv': dict(in_channels=8, out_channels=4),
    'mmseg.MAE': SMALL_VIT,
    'mmseg.ResNeXt': dict(depth=50, groups=32, base_width=4),
    'mmseg.ResNetV1d': dict(depth=50),
    'mmseg.TIMMBackbone': dict(model_name='resnet18'),
    'mmseg.VPD': dict(diffusion_cfg=dict(), class_embed_path=''),
    'mmseg.VisionTransformer': SMALL_VIT,
    'mmpretrain.BEiTViT': dict(arch='deit-tiny'),
    'mmpretrain.DeiT3': dict(arch='small'),
    'mmpretrain.DistilledVisionTransformer': dict(arch='deit-tiny'),
    'mmpretrain.HiViT': dict(arch='tiny'),
    'mmpretrain.MViT': dict(arch='tiny'),
    'mmpretrain.MlpMixer': dict(arch='small'),
    'mmpretrain.PCPVT': dict(arch='small'),
    'mmpretrain.RevVisionTransformer': dict(arch='deit-tiny'),
    'mmpretrain.SVT': dict(arch='small'),
    'mmpretrain.SparseConvNeXt': dict(arch='tiny'),
    'mmpretrain.TIMMBackbone': dict(model_name='resnet18'),
    'mmpretrain.TNT': dict(arch='small'),
    'mmpretrain.VGG': dict(depth=11),
    'mmpretrain.VisionTransformer': dict(arch='deit-tiny'),
    'mmpretrain.XCiT': dict(patch_size=16, embed_dims=128, depth=12, num_heads=4),
}
"""Arguments of classes that no config of their library uses, or that are large by default."""


@dataclass
class Row:
    """The result of one class.

    Attributes:
        library: The library that registers the class.
        name: Name of the class.
        result: ``'exact'``, ``'wrong'``, ``'no effect'`` (of the denoisers, so that nothing is proven), ``'no layer'``
            (that could have a denoiser), ``'crash'`` or ``'not built'``.
        built: Source of its arguments: ``'default'``, the arguments themselves, or a config of the library.
        image: Shape of the input image.
        converted: Number of layers with a denoiser.
        skipped: Number of skipped layers by reason and by name, with ``*`` for digits.
        parameters: Number of parameters without denoisers.
        extra_parameters: Number of parameters of the denoisers.
        difference: Largest relative difference of fused and unfused outputs.
        effect: Largest relative difference of vanilla and denoised outputs.
        note: Why it was not built or crashed, or a remark.
    """

    library: str
    name: str
    result: str = 'not built'
    built: str = ''
    image: str = ''
    converted: int = 0
    skipped: dict[str, Counter] = field(default_factory=dict)
    parameters: int = 0
    extra_parameters: int = 0
    difference: float | None = None
    effect: float | None = None
    note: str = ''


def parse_args() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=__doc__, epilog='With --library or --only, prints the result instead.')
    parser.add_argument('--library', nargs='+', choices=LIBRARIES, default=LIBRARIES, help='only these libraries')
    parser.add_argument('--only', nargs='+', metavar='NAME', help='only these classes')
    parser.add_argument('--jobs', type=int, default=1, help='number of processes, one thread each (default: 1)')
    parser.add_argument('--timeout', type=float, default=600, help='seconds for one class (default: 600)')
    return parser.parse_args()


def main() -> None:
    """Surveys the chosen classes, each in a separate process."""
    args = parse_args()
    os.environ.update(OMP_NUM_THREADS='1', PYTHONWARNINGS='ignore')
    from tqdm import tqdm

    classes = [(library, name) for library in args.library for name in backbone_classes(library)]
    if args.only:
        if unknown := set(args.only) - {name for _, name in classes}:
            raise InputError(f'{", ".join(args.library)} registers no backbone {min(unknown)}')
        classes = [(library, name) for library, name in classes if name in args.only]
    multiprocessing.set_forkserver_preload([f'{library}.models' for library in args.library])
    rows = []
    with ThreadPoolExecutor(args.jobs) as pool:
        tasks = [pool.submit(survey_apart, *key, args.timeout) for key in classes]
        for task in tqdm(as_completed(tasks), total=len(tasks), unit='class'):
            rows.append(row := task.result())
            if row.result != 'exact':
                tqdm.write(f'{row.library}.{row.name}: {row.result}; {row.note}', file=sys.stderr)
    rows.sort(key=lambda row: classes.index((row.library, row.name)))
    if len(args.library) == len(LIBRARIES) and not args.only:
        PAGE.write_text(page(rows))
        print(summary(rows))
    else:
        print(summary(rows), '', table(rows), sep='\n')
    if any(row.result in ('wrong', 'no effect', 'crash') for row in rows):
        sys.exit(1)


def backbone_classes(library: str) -> dict[str, type]:
    """Returns the registered classes of ``<library>.models.backbones.*`` by name."""
    importlib.import_module(f'{library}.models')
    registered = importlib.import_module(f'{library}.registry').MODELS.module_dict
    classes = {name: item for name, item in sorted(registered.items()) if inspect.isclass(item)}
    return {name: item for name, item in classes.items() if item.__module__.startswith(f'{library}.models.backbones.')}


def survey_apart(library: str, name: str, timeout: float) -> Row:
    """Runs :func:`survey` in a separate process, which isolates its memory and crashes."""
    context = multiprocessing.get_context('forkserver')
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send_survey, args=(sender, library, name), daemon=True)
    process.start()
    sender.close()
    row = Row(library, name, 'crash', note=f'no result within {timeout:g} seconds')
    try:
        if receiver.poll(timeout):
            row = receiver.recv()
    except EOFError:
        process.join()
        row.note = f'the process ended with exit code {process.exitcode}'
    process.kill()
    process.join()
    return row


def _send_survey(sender: Any, library: str, name: str) -> None:
    import torch

    warnings.simplefilter('ignore')
    logging.disable()
    torch.set_num_threads(1)
    with open(os.devnull, 'w') as nowhere, contextlib.redirect_stdout(nowhere):
        try:
            row = survey(library, name)
        except Exception as error:  # a class may fail in any way
            row = Row(library, name, 'crash', note=sentence(error))
    sender.send(row)


def survey(library: str, name: str) -> Row:
    """Builds one class with random denoisers, and compares its outputs with the vanilla and the fused model's.

    As in a training, DenoiseRepBackbone builds and converts the model, the weights are initialised, and the fused state
    dict is loaded into the backbone without denoisers.

    Raises:
        Exception: Any error after the class was built.
    """
    import torch
    from mmengine.registry import MODELS, DefaultScope

    import mmdenoiserep  # noqa: F401  (registers DenoiseRepBackbone)
    from mmdenoiserep.core import fuse_state_dict, verify_fusion
    from mmdenoiserep.core.method.record import find_records

    torch.manual_seed(0)
    row = Row(library, name)
    backbone_classes(library)
    if library == 'mmpretrain':  # the sparse classes read the mask of SparK's pretraining: one that hides nothing
        importlib.import_module('mmpretrain.models.utils').SparseHelper._cur_active = torch.ones(1, 1, 7, 7)
    with DefaultScope.overwrite_default_scope(library):
        config, vanilla, row.built, row.note = build_smallest(library, name)
        if vanilla is None:
            return row
        row.parameters = sum(p.numel() for p in vanilla.parameters())
        try:
            denoised = MODELS.build(dict(type='DenoiseRepBackbone', backbone=config, targets='all', rank=RANK))
        except ValueError as error:
            if 'matches no layer that can be denoised' not in str(error):
                raise
            row.result, row.note = 'no layer', str(error).partition('; ')[2].rpartition('but: ')[2]
            return row
        if hasattr(denoised, 'init_weights'):
            denoised.init_weights()

    [(_, _, record)] = find_records(denoised)
    report = record.report
    row.converted, row.extra_parameters = len(report.layers), report.extra_parameters
    for layer, reason in sorted(report.skipped.items()):
        row.skipped.setdefault(reason, Counter())[re.sub(r'\d+', '*', layer)] += 1
    if report.probe_failure:
        row.note = f'dry run failed: {report.probe_failure}'

    denoised, vanilla = randomise(widen(denoised)), widen(vanilla)
    image = small_image(vanilla, record.image_shape)
    row.image = 'x'.join(map(str, image.shape[1:]))
    state, fused = denoised.state_dict(), copy.deepcopy(vanilla)
    load(vanilla, {key: value for key, value in state.items() if '.denoiser.' not in key})
    load(fused, fuse_state_dict(state))
    row.effect = largest(verify_fusion(denoised, vanilla, image))
    row.difference = largest(verify_fusion(denoised, fused, image))
    if not row.difference <= TOLERANCE:
        row.result = 'wrong'
    else:
        row.result = 'exact' if row.effect > TOLERANCE else 'no effect'
    return row


def build_smallest(library: str, name: str) -> tuple[dict[str, Any], Any, str, str]:
    """Builds a class with its defaults, or if they fail, with the config of its library that gives the smallest model.

    Configs with other convolutions (``conv_cfg``) are used only if there are no others.

    Returns:
        The config; the backbone, or None if all attempts failed; the source of the arguments; the last failure.
    """
    from mmengine.registry import MODELS

    best: tuple = ()
    failure = ''
    for config, source in candidates(library, name):
        try:
            model = MODELS.build(copy.deepcopy(config))
        except Exception as error:  # the arguments may lack anything
            failure = sentence(error)
            continue
        size = bool(config.get('conv_cfg')), sum(p.numel() for p in model.parameters())
        if not best or size < best[0]:
            best = size, config, model, source
        if not source.endswith('.py'):
            break
    return (*best[1:], '') if best else ({}, None, '', failure)


def candidates(library: str, name: str) -> Iterator[tuple[dict[str, Any], str]]:
    """Yields configs of a class and their sources: its defaults, then the configs of its library."""
    from mmengine.config import Config

    kind = f'{library}.{name}'
    if arguments := ARGUMENTS.get(kind):
        yield dict(type=kind, **arguments), ', '.join(f'{key}={value}' for key, value in arguments.items())
        return
    yield dict(type=kind), 'default'
    folder = Path(importlib.import_module(library).__file__).parent / '.mim' / 'configs'
    seen = []
    for path in sorted(folder.rglob('*.py')):
        if re.search(rf'[\'"]{name}[\'"]', path.read_text()):
            for config in find_type(Config.fromfile(path).to_dict(), name):
                config = without_weights(dict(config, type=kind))
                if config not in seen:
                    seen.append(config)
                    yield config, str(path.relative_to(folder))


def find_type(value: Any, name: str) -> Iterator[dict]:
    """Yields every dict of the type ``name`` in a nested config."""
    if isinstance(value, dict):
        if value.get('type') == name:
            yield value
        value = list(value.values())
    if isinstance(value, list | tuple):
        for item in value:
            yield from find_type(item, name)


def without_weights(value: Any) -> Any:
    """Returns a config without pretrained weights."""
    if isinstance(value, dict):
        return {k: without_weights(v) for k, v in value.items() if k not in ('init_cfg', 'pretrained')}
    return type(value)(map(without_weights, value)) if isinstance(value, list | tuple) else value


def widen(backbone: Any) -> Any:
    """Converts a backbone to float64, and the inputs of its layers: some create position embeddings in float32."""
    from torch import nn

    for module in backbone.double().modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            module.register_forward_pre_hook(lambda layer, args: tuple(value.to(layer.weight) for value in args))
    return backbone


def randomise(backbone: Any) -> Any:
    """Sets the parameters of a float64 backbone to random values, so that no layer and no denoiser is zero.

    Matrices and kernels are replaced; scales, biases and BatchNorm statistics get noise.
    """
    import torch
    from torch.nn.modules.batchnorm import _NormBase

    generator = torch.Generator().manual_seed(0)

    def noise(tensor: Any, size: float) -> Any:
        return torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype) * size

    with torch.no_grad():
        for module in backbone.modules():
            if isinstance(module, _NormBase) and module.running_mean is not None:
                module.running_mean += noise(module.running_mean, 0.2)
                module.running_var += torch.rand(module.running_var.shape, generator=generator, dtype=torch.float64)
        for name, parameter in backbone.named_parameters():
            if parameter.dim() < 2:
                parameter += noise(parameter, 0.2)
            elif '.denoiser.' in name:
                parameter.copy_(noise(parameter, 0.5 / parameter.shape[-1] ** 0.5))
            else:
                parameter.copy_(noise(parameter, 1 / max(parameter[0].numel(), 1) ** 0.5))
    return backbone


def load(backbone: Any, state: Mapping[str, Any]) -> None:
    """Loads a state dict with exactly the names of the backbone.

    ``strict=True`` would fail for SwinV2, which drops buffers while loading.

    Raises:
        ValueError: A name is missing or unknown.
    """
    if wrong := sorted(set(backbone.state_dict()) ^ set(state)):
        raise ValueError(f'{wrong[0]} does not fit the vanilla backbone')
    backbone.load_state_dict(state, strict=False)


def small_image(backbone: Any, shape: Sequence[int]) -> Any:
    """Returns a random image of 64 x 64 pixels if the backbone runs on it, otherwise one of the given shape."""
    import torch

    from mmdenoiserep.core import evaluating
    from mmdenoiserep.core.utils.randomness import random_images

    image = random_images(shape, torch.float64)
    with evaluating(backbone), contextlib.suppress(Exception):  # other sizes may fail in any way
        copy.deepcopy(backbone)(image[..., :64, :64])  # a copy, since some cache position embeddings of that size
        return image[..., :64, :64]
    return image


def largest(verification: Any) -> float:
    """Returns the largest relative difference, or NaN if one is NaN."""
    return max((d.max_rel for d in verification.differences), key=lambda value: (value != value, value))


def sentence(error: BaseException) -> str:
    """Returns an error as one line."""
    return f'{type(error).__name__}: {error}'.strip().splitlines()[0]


def summary(rows: Sequence[Row]) -> str:
    """Returns one sentence with the number of classes for each result."""
    results = Counter(row.result for row in rows)
    built = len(rows) - results['not built']
    converted = sum(row.converted > 0 for row in rows)
    counts = ', '.join(f'{results[kind]} {kind}' for kind in ('exact', 'wrong', 'no effect', 'crash', 'no layer'))
    return (
        f'{len(rows)} classes, {built} of them built: {counts}; '
        f'{converted} of {built} ({converted / max(built, 1):.1%}) have at least one denoised layer.'
    )


def table(rows: Iterable[Row]) -> str:
    """Returns the rows as a table in Markdown."""
    header = (
        'class',
        'arguments',
        'image',
        'denoised',
        'skipped',
        'extra parameters',
        'effect',
        'difference',
        'result',
    )
    lines = [header, ['---'] * len(header)]
    for row in rows:
        skipped = (
            f'{reason.partition(":")[0]}: ' + ', '.join(f'`{name}` x{count}' for name, count in names.items())
            for reason, names in row.skipped.items()
        )
        lines.append(
            [
                f'{row.library}.{row.name}',
                row.built,
                row.image,
                str(row.converted),
                '; '.join(skipped),
                f'{row.extra_parameters:,} ({row.extra_parameters / row.parameters:.1%})' if row.converted else '',
                '' if row.effect is None else f'{row.effect:.2g}',
                '' if row.difference is None else f'{row.difference:.1e}',
                f'{row.result}: {row.note}' if row.note else row.result,
            ]
        )
    return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def versions() -> str:
    """Returns the versions of the libraries, without the build (such as ``+cpu``)."""
    packages = (importlib.import_module(name) for name in (*LIBRARIES, 'mmcv', 'torch'))
    return ', '.join(f'{package.__name__} {package.__version__.partition("+")[0]}' for package in packages)


def page(rows: Sequence[Row]) -> str:
    """Returns the page of the docs."""
    return f"""# Every backbone class of mmdet, mmseg and mmpretrain

**{summary(rows)}**

Written by `python -m studies.survey_backbones --jobs 2` with {versions()}, on the CPU, in float64.

Every registered class of `<library>.models.backbones` goes the way of a training run: `DenoiseRepBackbone` builds it
and gives all layers denoisers of rank {RANK}, `init_weights()` runs, the denoisers are fused, and the fused state dict
is loaded into the backbone that the inner config alone builds. All weights, BatchNorm statistics and denoisers are
random, so that nothing is switched off. Both run in eval mode on one random image, a small one where the class allows.

* **arguments**: `default`, or the config of the library that makes the smallest model, without its files of weights,
  or the arguments themselves, for classes that stand in no config or are large by default.
* **image**: channels, height and width of what they run on.
* **denoised**: layers that got a denoiser with `targets='all'`.
* **skipped**: layers that did not, by reason; `*` stands for a number. A layer is bypassed where a parent reads its
  weight by itself, so that a denoiser in the layer would not run.
* **extra parameters**: those of the denoisers, until they are fused, and their share of the others.
* **effect**: largest difference of the outputs with and without denoisers, relative to the largest output.
* **difference**: the same, before and after fusing.
* **result**: `exact` where the difference is at most {TOLERANCE:.0e}, `wrong` where it is larger, `no effect` where the
  denoisers change nothing, so that nothing is proven, `no layer` where none can have a denoiser.

mmpretrain's sparse classes need the mask that SparK's pretraining sets; here it hides nothing.

{table(rows)}
"""


if __name__ == '__main__':
    launch(main)
