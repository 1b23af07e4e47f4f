"""Measures the times of functions in alternation, and the peak memory of a function."""

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
    """Returns the seconds of each call of each function.

    The functions take turns, and every round reverses their order, so slow changes (clock, other load) affect all of
    them equally. If a GPU is in use, the times include its work.

    Args:
        functions: The functions by name.
        warm_up: Number of rounds before the timed ones.
        repeats: Number of timed rounds.
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
    """Quartiles of the ratio of two costs (seconds or MiB); prints as ``1.050 (1.040 to 1.070)``."""

    low: float
    median: float
    high: float

    def __str__(self) -> str:
        return f'{self.median:.3f} ({self.low:.3f} to {self.high:.3f})'


def cost_ratio(ours: Sequence[float], other: Sequence[float]) -> CostRatio:
    """Returns the quartiles of the ratios of two lists of costs, pair by pair."""
    ratios = [a / b for a, b in zip(ours, other, strict=True)]
    if len(ratios) == 1:
        return CostRatio(*ratios * 3)
    low, middle, high = quantiles(ratios, n=4, method='inclusive')
    return CostRatio(low, middle, high)


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """Returns the exponent p of the power law ``cost = a size^p``, by least squares of the logarithms."""
    return linear_regression([math.log(size) for size in sizes], [math.log(cost) for cost in costs]).slope


def peak_memory(function: Callable, *args: Any, imports: Iterable[str] = ('torch', 'mmdenoiserep')) -> float:
    """Returns the peak memory of ``function(*args)`` in MiB: the growth of the resident memory of a new process.

    The modules of ``imports`` and the arguments do not count, imports inside the function do. If the function uses a
    GPU, returns the peak memory of its tensors there. Needs Linux.

    Args:
        function: A top-level function of a module.
        *args: Its arguments, which are pickled.
        imports: Modules to import first, besides the module of the function.

    Raises:
        RuntimeError: The system can't reset or report the peak memory of a process.
    """
    call = pickle.dumps((function, args))  # by value: the pool would put tensors into shared memory
    with ProcessPoolExecutor(1, mp_context=get_context('spawn')) as pool:
        return pool.submit(_growth, call, tuple(imports)).result()


def isolated(function: Callable, *args: Any) -> Any:
    """Returns ``function(*args)`` of a new process, whose memory nothing else has used."""
    with ProcessPoolExecutor(1, mp_context=get_context('spawn')) as pool:
        return pool.submit(function, *args).result()


def peak() -> float:
    """Returns the peak memory of this process in MiB, its libraries included; on a GPU, of its tensors there."""
    torch = sys.modules.get('torch')
    if torch and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**20
    return _status('VmHWM')


def _growth(call: bytes, imports: tuple[str, ...]) -> float:
    for name in imports:
        import_module(name)
    function, args = pickle.loads(call)
    del call
    try:
        Path('/proc/self/clear_refs').write_text('5')  # resets the peak, VmHWM, to the present memory
    except OSError as error:
        raise RuntimeError(f'peak memory needs Linux with a writable /proc/self/clear_refs ({error})') from None
    before = _status('VmRSS')
    function(*args)
    torch = sys.modules.get('torch')
    if torch and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2**20
    return _status('VmHWM') - before


def _status(field: str) -> float:
    """Returns a field of ``/proc/self/status`` in MiB."""
    match = re.search(rf'^{field}:\s+(\d+) kB$', Path('/proc/self/status').read_text(), re.MULTILINE)
    if not match:
        raise RuntimeError(f'peak memory needs {field} in /proc/self/status, which this system does not report')
    return int(match[1]) / 1024


def _synchronise() -> None:
    torch = sys.modules.get('torch')
    if torch and torch.cuda.is_initialized():
        torch.cuda.synchronize()
