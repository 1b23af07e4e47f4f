"""Random images that are the same in every call, and all random number generators seeded for a while."""

import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
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


Generator = tuple[Callable[[], Any], Callable[[Any], object], Callable[[int], object]]
"""The functions of a random number generator that get its state, set its state, and seed it."""


@contextmanager
def equal_draws(*modules: nn.Module, seed: int = 0) -> Iterator[None]:
    """Seeds the generators of Python, numpy and torch inside the context, and restores their states afterwards.

    Two runs of a model that draws random numbers (MAE masks patches in eval mode too) then draw the same ones. Covers
    the global generators and those that modules hold as attributes. Neither imports numpy nor initialises CUDA.

    Args:
        modules: Models that may hold generators as attributes.
        seed: The seed of all generators.
    """
    generators = [*_global_generators(), *_module_generators(modules)]
    states = [get_state() for get_state, _, _ in generators]
    try:
        for _, _, set_seed in generators:
            set_seed(seed)
        yield
    finally:
        for (_, set_state, _), state in zip(generators, states, strict=True):
            set_state(state)


def _global_generators() -> Iterator[Generator]:
    yield random.getstate, random.setstate, random.seed
    cuda = torch.cuda.default_generators if torch.cuda.is_available() and torch.cuda.is_initialized() else ()
    for generator in (torch.default_generator, *cuda):
        yield generator.get_state, generator.set_state, generator.manual_seed
    if numpy := sys.modules.get('numpy'):
        yield numpy.random.get_state, numpy.random.set_state, numpy.random.seed


def _module_generators(modules: tuple[nn.Module, ...]) -> Iterator[Generator]:
    numpy = sys.modules.get('numpy')
    for value in (value for module in modules for part in module.modules() for value in part.__dict__.values()):
        if isinstance(value, torch.Generator):
            yield value.get_state, value.set_state, value.manual_seed
        elif isinstance(value, random.Random):
            yield value.getstate, value.setstate, value.seed
        elif numpy and isinstance(value, numpy.random.RandomState):
            yield value.get_state, value.set_state, value.seed
        elif numpy and isinstance(value, numpy.random.Generator):
            yield _numpy_generator(value.bit_generator)


def _numpy_generator(bits: Any) -> Generator:
    set_state = partial(setattr, bits, 'state')
    return lambda: bits.state, set_state, lambda seed: set_state(type(bits)(seed).state)
