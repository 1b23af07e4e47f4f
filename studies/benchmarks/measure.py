"""Times of functions that take turns, and the memory that one needs at its peak."""

import math
import pickle
import re
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from statistics import linear_regression, quantiles
from typing import Any, NamedTuple


def alternate(functions: dict[str, Callable[[], object]], warm_up: int, repeats: int) -> dict[str, list[float]]:
    """Returns the seconds of every call of every function, ``repeats`` each, without the ``warm_up`` calls before.

    The functions take turns, and the order reverses with every round, so that what changes slowly (clock, other load)
    meets all of them alike. Work on a GPU that is in use is waited for.

    Args:
        functions: What to call, by name.
        warm_up: Rounds that are not timed.
        repeats: Rounds that are.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for i in range(warm_up + repeats):
        for name in list(functions) if i % 2 == 0 else reversed(functions):
            _synchronise()
            started = time.perf_counter()
            functions[name]()
            _synchronise()
            if i >= warm_up:
                seconds[name].append(time.perf_counter() - started)
    return seconds


class CostRatio(NamedTuple):
    """Quartiles of what one thing takes over what another takes; prints as ``1.05 (1.04 to 1.07)``."""

    low: float
    median: float
    high: float

    def __str__(self) -> str:
        return f'{self.median:.3f} ({self.low:.3f} to {self.high:.3f})'


def ratio(ours: Sequence[float], other: Sequence[float]) -> CostRatio:
    """Returns the quartiles of the ratios of two lists, pair by pair."""
    ratios = [a / b for a, b in zip(ours, other, strict=True)]
    if len(ratios) == 1:
        return CostRatio(*ratios * 3)
    low, middle, high = quantiles(ratios, n=4, method='inclusive')
    return CostRatio(low, middle, high)


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """Returns p of the power law ``cost = a size^p`` that fits best (least squares of the logarithms)."""
    return linear_regression([math.log(size) for size in sizes], [math.log(cost) for cost in costs]).slope


def peak_memory(function: Callable, *args: Any, imports: Iterable[str] = ('torch', 'mmdenoiserep')) -> float:
    """Returns the MiB by which the resident memory grew at its peak while ``function(*args)`` ran in a fresh process.

    Modules and arguments are there before and do not count; what the function imports by itself does. Where the
    function used a GPU, the peak of its tensors there is returned instead. Linux only.

    Args:
        function: A function at the top of a module, which the fresh process finds by its name.
        *args: Handed to it, by pickle.
        imports: Modules that the fresh process imports first, besides the function's own.

    Raises:
        RuntimeError: The system does not let a process reset its peak.
    """
    call = pickle.dumps((function, args))  # by value: the pool would put tensors into shared memory
    with ProcessPoolExecutor(1, mp_context=get_context('spawn')) as pool:
        return pool.submit(_growth, call, tuple(imports)).result()


def _growth(call: bytes, imports: tuple[str, ...]) -> float:
    for name in imports:
        import_module(name)
    function, args = pickle.loads(call)
    del call
    try:
        Path('/proc/self/clear_refs').write_text('5')  # makes the peak, VmHWM, what is resident now
    except OSError as error:
        raise RuntimeError(f'peak memory needs Linux with a writable /proc/self/clear_refs ({error})') from None
    before = _status('VmRSS')
    function(*args)
    torch = sys.modules.get('torch')
    if torch and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**20
    return _status('VmHWM') - before


def _status(field: str) -> float:
    """Returns a field of the process's status in MiB."""
    match = re.search(rf'^{field}:\s+(\d+) kB$', Path('/proc/self/status').read_text(), re.MULTILINE)
    if not match:
        raise RuntimeError(f'peak memory needs {field} in /proc/self/status, which this system does not report')
    return int(match[1]) / 1024


def _synchronise() -> None:
    torch = sys.modules.get('torch')
    if torch and torch.cuda.is_initialized():
        torch.cuda.synchronize()
