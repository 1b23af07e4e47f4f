"""Equal random numbers for several runs, without a trace in the random numbers of the program."""

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def equal_draws(seed: int = 0) -> Iterator[None]:
    """Starts the global generators of Python, numpy and torch at a seed; afterwards they are as they were.

    Two runs of a model that draws random numbers (MAE hides patches in eval mode too) see the same ones. numpy is
    seeded where the program has imported it, and CUDA where it is in use: nothing is loaded or initialised for this.

    Args:
        seed: The seed, the same for all generators.
    """
    numpy = sys.modules.get('numpy')
    generators = [torch.default_generator]
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        generators += torch.cuda.default_generators
    states = [generator.get_state() for generator in generators]
    python, array = random.getstate(), numpy.random.get_state() if numpy else None
    try:
        for generator in generators:
            generator.manual_seed(seed)
        random.seed(seed)
        if numpy:
            numpy.random.seed(seed)
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            generator.set_state(state)
        random.setstate(python)
        if numpy:
            numpy.random.set_state(array)
