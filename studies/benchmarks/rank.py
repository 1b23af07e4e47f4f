"""Cost of a training step by width and rank: the training loop of docs/own-model.md against a plain one.

Four Linear layers of one width with GELU, random tokens, AdamW. Runs on the GPU if there is one.
"""

import argparse
from collections.abc import Callable
from contextlib import ExitStack
from statistics import median
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this benchmark."""
    parser.add_argument(
        '--widths', type=int, nargs='+', default=[64, 128, 256, 512], help='channels (default: %(default)s)'
    )
    parser.add_argument('--vectors', type=int, default=4096, help='tokens in a batch (default: %(default)s)')
    parser.add_argument('--repeats', type=int, default=30, help='timed steps of each (default: %(default)s)')


def run(args: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """Returns the report, and the quartiles of the ratios by width under ``widths``."""
    from mmdenoiserep.core import DEFAULT_RANK
    from studies.benchmarks.measure import alternate, cost_ratio

    ways = {
        f'rank {DEFAULT_RANK}, 128 tokens': (DEFAULT_RANK, 128),
        'full rank, 128 tokens': (None, 128),
        f'rank {DEFAULT_RANK}, all tokens': (DEFAULT_RANK, None),
        'full rank, all tokens': (None, None),
    }
    lines = [f'| width | plain | {" | ".join(ways)} |', '|---|---|' + '---|' * len(ways)]
    widths = {}
    for width in args.widths:
        with ExitStack() as stack:
            steps = {'plain': make_step(stack, width, args.vectors)}
            steps |= {way: make_step(stack, width, args.vectors, *options) for way, options in ways.items()}
            seconds = alternate(steps, warm_up=3, repeats=args.repeats)
        ratios = {way: cost_ratio(seconds[way], seconds['plain']) for way in ways}
        plain = f'{1000 * median(seconds["plain"]):.1f} ms'
        lines.append(f'| {width} | {plain} | {" | ".join(map(str, ratios.values()))} |')
        widths[width] = ratios
    lines += ['', f'Ratios to the plain step, quartiles of {args.repeats}; {args.vectors:,} tokens a batch.']
    return '\n'.join(lines), dict(widths=widths)


def make_step(stack: ExitStack, width: int, vectors: int, *denoising: int | None) -> Callable[[], None]:
    """Returns a function that makes a training step.

    Args:
        stack: Closes the context of the denoising losses; it must stay open for the steps.
        width: Channels of every layer.
        vectors: Number of tokens in a batch.
        *denoising: Rank, and number of tokens of the loss; nothing for a plain model.
    """
    import torch
    from torch import nn

    from mmdenoiserep.core import apply_denoiserep, denoise_losses

    torch.manual_seed(0)
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    model = nn.Sequential(*(part for _ in range(4) for part in (nn.Linear(width, width), nn.GELU()))).to(device)
    x = torch.randn(vectors, width, device=device)
    if denoising:
        rank, tokens = denoising
        apply_denoiserep(model, 'all', rank=rank, example_input=x[:1])
        losses = stack.enter_context(denoise_losses(model, tokens))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> None:
        loss = model(x).square().mean()
        if denoising:
            loss = loss + losses.mean(0.01)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step
