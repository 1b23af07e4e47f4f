"""Equal random numbers for several runs, without a trace in the random numbers of the program."""

import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def random_images(shape: Sequence[int], dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Returns the same standard normal images in every call, on the CPU.

    Args:
        shape: (B, C, H, W).
        dtype: A floating-point dtype; each has its own numbers.
        seed: Seed of a generator of their own; the global generators stay as they are.
    """
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed), dtype=dtype, device='cpu')


Handle = tuple[Callable[[], Any], Callable[[Any], object], Callable[[int], object]]
"""How to read the state of a generator, to set it, and to start it at a seed."""


@contextmanager
def equal_draws(*modules: nn.Module, seed: int = 0) -> Iterator[None]:
    """Starts the generators of Python, numpy and torch at a seed; afterwards they are as they were.

    Two runs of a model that draws random numbers (MAE hides patches in eval mode too) see the same ones. These are the
    global generators and those that modules hold as attributes. numpy is seeded where the program has imported it, and
    CUDA where it is in use: nothing is loaded or initialised for this.

    Args:
        modules: Models that may have generators of their own.
        seed: The seed, the same for all generators.
    """
    handles = [*_global_handles(), *_own_handles(modules)]
    states = [get() for get, _, _ in handles]
    try:
        for _, _, start in handles:
            start(seed)
        yield
    finally:
        for (_, put, _), state in zip(handles, states, strict=True):
            put(state)


def _global_handles() -> Iterator[Handle]:
    yield random.getstate, random.setstate, random.seed
    generators = [torch.default_generator]
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        generators += torch.cuda.default_generators
    for generator in generators:
        yield generator.get_state, generator.set_state, generator.manual_seed
    if numpy := sys.modules.get('numpy'):
        yield numpy.random.get_state, numpy.random.set_state, numpy.random.seed


def _own_handles(modules: tuple[nn.Module, ...]) -> Iterator[Handle]:
    numpy = sys.modules.get('numpy')
    for value in (value for module in modules for part in module.modules() for value in part.__dict__.values()):
        if isinstance(value, torch.Generator):
            yield value.get_state, value.set_state, value.manual_seed
        elif isinstance(value, random.Random):
            yield value.getstate, value.setstate, value.seed
        elif numpy and isinstance(value, numpy.random.RandomState):
            yield value.get_state, value.set_state, value.seed
        elif numpy and isinstance(value, numpy.random.Generator):
            yield _numpy_handle(value.bit_generator)


def _numpy_handle(bits: Any) -> Handle:
    def put(state: Any) -> None:
        bits.state = state

    return lambda: bits.state, put, lambda seed: put(type(bits)(seed).state)
