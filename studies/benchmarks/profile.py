"""Times of the operators of a joint training step against a plain step: those that differ most.

ViT-S/16 at 224 pixels, torch's profiler; self time, without the operators that an operator calls.
"""

import argparse
from typing import Any

import numpy as np

MODEL = 'ViT-S/16'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this benchmark."""
    parser.add_argument('--batch', type=int, default=16, help='images in a batch (default: %(default)s)')
    parser.add_argument('--steps', type=int, default=3, help='profiled steps of each (default: %(default)s)')
    parser.add_argument('--rows', type=int, default=8, help='operators to show (default: %(default)s)')


def run(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Returns the report, and the milliseconds of a step by rank and operator under ``milliseconds``."""
    from studies.benchmarks.cost import PLAIN, RANKS

    ways = [PLAIN, *RANKS]
    milliseconds = {way: profile(way, args.batch, args.steps) for way in ways}
    names = sorted({name for times in milliseconds.values() for name in times})
    table = np.array([[milliseconds[way].get(name, 0.0) for way in ways] for name in names])
    order = np.argsort(-np.abs(table - table[:, :1]).max(1))
    shown, others = order[: args.rows], order[args.rows :]
    rows = [(names[i], table[i]) for i in shown]
    rows += [('the other operators', table[others].sum(0)), ('all', table.sum(0))]
    lines = [f'| operator, ms a step | {" | ".join(ways)} |', '|---|' + '---|' * len(ways)]
    lines += [f'| {name} | {" | ".join(f"{value:,.0f}" for value in values)} |' for name, values in rows]
    lines += ['', f'Means of {args.steps} steps of {args.batch} images, one way after the other.']
    return '\n'.join(lines), dict(milliseconds=milliseconds)


def profile(way: str, batch: int, steps: int) -> dict[str, float]:
    """Returns the milliseconds of each operator in a step, on the GPU if there is one."""
    import torch

    from studies.benchmarks.cost import PLAIN, Run

    run = Run(MODEL, batch, None if way == PLAIN else way, amp=False)
    run.start('joint')
    run.step()
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if run.device.type == 'cuda':
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=kinds) as record:
        for _ in range(steps):
            run.step()
    key = 'self_device_time_total' if run.device.type == 'cuda' else 'self_cpu_time_total'
    return {event.key: getattr(event, key) / 1000 / steps for event in record.key_averages()}
