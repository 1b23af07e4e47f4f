"""Cost of fusing a checkpoint file against loading and saving it, by file size.

Generated files of MLPs (1024 to 4096 channels and back) with random weights and denoisers of the default rank.
"""

import argparse
import os
import tempfile
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

SIZES = (75, 150, 300)
"""Parameters in millions."""

GOAL = 2.2
"""Largest memory over the size of the file."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this benchmark."""
    parser.add_argument(
        '--sizes', type=int, nargs='+', default=SIZES, metavar='M', help='million parameters (default: 75 150 300)'
    )
    parser.add_argument('--repeats', type=int, default=5, help='timed runs of each (default: %(default)s)')
    parser.add_argument('--folder', type=Path, help='folder for the files (default: a temporary folder)')


def run(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Returns the report, and its figures under ``rows``, one for each size.

    Raises:
        RuntimeError: The system does not report the memory.
    """
    from studies.benchmarks.measure import cost_ratio, exponent

    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        rows = [measure(Path(folder), size, args.repeats) for size in args.sizes]
    lines = [
        '| million parameters | file | load and save | fuse | ratio (quartiles) | peak memory of fusing | '
        'in files | goal |',
        '|---|---|---|---|---|---|---|---|',
    ]
    for row in rows:
        times = cost_ratio(row['seconds']['fuse'], row['seconds']['load and save'])
        files = row['peak_mib'] / row['file_mib']
        verdict = f'{"met" if files <= GOAL else "missed"} (at most {GOAL})'
        seconds = ' | '.join(f'{median(row["seconds"][way]):.2f} s' for way in ('load and save', 'fuse'))
        lines.append(
            f'| {row["parameters"] / 1e6:.0f} | {row["file_mib"]:,.0f} MiB | {seconds} | {times} | '
            f'{row["peak_mib"]:,.0f} MiB | {files:.2f} | {verdict} |'
        )
    growth = exponent([row['parameters'] for row in rows], [median(row['seconds']['fuse']) for row in rows])
    note = (
        f'Medians of {args.repeats} alternating runs. Load and save is torch.load, torch.save and fsync of the same '
        'file; memory is the peak growth of a new process, with the pages of the mapped file.'
    )
    return '\n'.join([*lines, '', f'Seconds of fusing grow as parameters^{growth:.2f}. {note}']), dict(
        rows=rows, exponent=growth
    )


def measure(folder: Path, millions: int, repeats: int) -> dict[str, Any]:
    """Returns ``parameters``, ``file_mib``, ``seconds`` of all runs by way, and ``peak_mib`` of fusing."""
    from studies.benchmarks.measure import alternate, peak_memory

    source, target = folder / 'denoised.pth', folder / 'out.pth'
    parameters = write_file(source, millions)
    seconds = alternate(
        {'load and save': partial(load_and_save, source, target), 'fuse': partial(fuse, source, target)}, 1, repeats
    )
    row = dict(
        parameters=parameters,
        file_mib=source.stat().st_size / 2**20,
        seconds=seconds,
        peak_mib=peak_memory(fuse, source, target),
    )
    source.unlink()
    target.unlink()
    return row


def write_file(path: Path, millions: int) -> int:
    """Writes a checkpoint with denoisers and returns the number of its parameters."""
    import torch

    from mmdenoiserep.core import DEFAULT_RANK, DenoiseLinear

    state = {}
    generator = torch.Generator().manual_seed(0)
    for i in range(max(1, round(millions * 1e6 / (2 * 1024 * 4096)))):
        for name, (size_in, size_out) in dict(fc1=(1024, 4096), fc2=(4096, 1024)).items():
            layer = DenoiseLinear(size_in, size_out, rank=DEFAULT_RANK, device='meta')
            for key, value in layer.state_dict().items():
                state[f'blocks.{i}.{name}.{key}'] = 0.01 * torch.randn(value.shape, generator=generator)
    torch.save(dict(meta={}, state_dict=state), path)
    return sum(value.numel() for value in state.values())


def load_and_save(source: Path, target: Path) -> None:
    """Loads a file with torch and saves it to disk."""
    import torch

    checkpoint = torch.load(source, map_location='cpu', weights_only=True)
    with target.open('wb') as file:
        torch.save(checkpoint, file)
        file.flush()
        os.fsync(file.fileno())


def fuse(source: Path, target: Path) -> None:
    """Fuses a file."""
    from mmdenoiserep import fuse_checkpoint

    fuse_checkpoint(source, target, overwrite=True)
