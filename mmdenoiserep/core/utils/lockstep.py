"""Runs several functions side by side in one thread: each waits at places until the others have come as far."""

import contextvars
from collections.abc import Callable, Hashable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from greenlet import getcurrent, greenlet

DEVICES = ('cpu', 'cuda')
"""Device types whose autocast a model may switch."""


class Lockstep:
    """Runs that pause at places and go on together, one after the other.

    Each run has a call stack of its own (a greenlet), and all share one thread: threads of their own would each bring a
    pool of OpenMP threads and, on a GPU, a cuBLAS workspace. Grad mode, inference mode and autocast belong to the
    thread; a run finds them after a pause as it left them.

    Used as a context manager, which ends the runs that are still paused.

    Example:
        >>> from mmdenoiserep.core.utils.lockstep import Lockstep
        >>> with Lockstep() as steps:
        ...     for number in range(2):
        ...         steps.start(lambda: [steps.pause(place) for place in ('a', 'b')])
        ...     steps.resume('a')
        ...     steps.places
        ['b', 'b']
    """

    def __init__(self) -> None:
        self._hub = getcurrent()
        self._paused: dict[greenlet, Hashable] = {}
        self._state = ThreadState()

    def __enter__(self) -> 'Lockstep':
        return self

    def __exit__(self, *_: Any) -> None:
        with ExitStack() as stack:  # an error in one run does not keep the others from being ended
            for run in self._paused:
                stack.callback(_end, run)
            self._paused = {}

    @property
    def places(self) -> list[Hashable]:
        """Where the paused runs are, in the order in which they came there."""
        return list(self._paused.values())

    def start(self, function: Callable[[], Any]) -> None:
        """Calls a function, up to its first pause or its end."""
        run = greenlet(function)
        run.gr_context = contextvars.copy_context()
        self._switch(run)

    def pause(self, place: Hashable) -> None:
        """Pauses the run that calls this, until :meth:`resume` names the place."""
        with self._state.restored():
            self._hub.switch(place)

    def resume(self, place: Hashable) -> None:
        """Lets all runs that are paused at a place go on, one after the other, each up to its next pause or its end."""
        for run in [run for run, at in self._paused.items() if at == place]:
            del self._paused[run]
            self._switch(run)

    def _switch(self, run: greenlet) -> None:
        self._state = ThreadState()
        place: Any = run.switch()
        if not run.dead:
            self._paused[run] = place


def _end(run: greenlet) -> None:
    while not run.dead:  # a run that catches everything goes on to its next pause
        run.throw()


class ThreadState:
    """What torch keeps for a thread at the moment: grad mode, inference mode, autocast."""

    def __init__(self) -> None:
        self.grad = torch.is_grad_enabled()
        self.inference = torch.is_inference_mode_enabled()
        self.autocast = {kind: (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in DEVICES}

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Puts the thread into this state while it lasts."""
        now = ThreadState()
        with ExitStack() as stack:
            if now.inference != self.inference:
                stack.enter_context(torch.inference_mode(self.inference))
            stack.enter_context(torch.set_grad_enabled(self.grad))
            for kind, (enabled, dtype) in self.autocast.items():
                if now.autocast[kind] != (enabled, dtype):
                    stack.enter_context(torch.autocast(kind, dtype, enabled))
            yield
