"""Copies between memories, one after another, beside the computation."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch
from torch import Tensor

State = tuple[Tensor, ...]


class Ticket(Protocol):
    """Work that was begun."""

    def wait(self) -> None:
        """From here on the computation may use what the work made. A GPU's own queue waits, not the caller."""
        ...

    def join(self) -> None:
        """Return when the work is done."""
        ...


class Lane(Protocol):
    """Jobs are done in the order in which they were begun, after whatever the computation had been asked before."""

    def begin(self, job: Callable[[], None]) -> Ticket: ...

    def close(self) -> None: ...


class ThreadLane:
    """A thread, for memory of the CPU."""

    def __init__(self) -> None:
        self._thread: ThreadPoolExecutor | None = None

    def begin(self, job: Callable[[], None]) -> Ticket:
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="adjoint-copies")
        return _Done(self._thread.submit(job))

    def close(self) -> None:
        if self._thread is not None:
            self._thread.shutdown()
            self._thread = None


class _Done:
    def __init__(self, future: Future[None]) -> None:
        self._future = future

    def wait(self) -> None:
        self._future.result()

    join = wait


class StreamLane:
    """A CUDA stream of its own. Waits for a run on a CUDA device; :class:`ThreadLane` has the same face."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def begin(self, job: Callable[[], None]) -> Ticket:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            job()
            return _Event(self._stream.record_event(), self._device)

    def close(self) -> None:
        self._stream.synchronize()


class _Event:
    def __init__(self, event: torch.cuda.Event, device: torch.device) -> None:
        self._event, self._device = event, device

    def wait(self) -> None:
        torch.cuda.current_stream(self._device).wait_event(self._event)

    def join(self) -> None:
        self._event.synchronize()


def lane_for(device: torch.device) -> Lane:
    """What copies to and from this device go through."""
    return StreamLane(device) if device.type == "cuda" else ThreadLane()


def copy(targets: State, sources: State) -> None:
    """Numbers from one memory to another; in a lane, without holding up the caller."""
    with torch.no_grad():
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source, non_blocking=True)
