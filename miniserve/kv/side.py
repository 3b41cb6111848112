"""What a GPU copies beside its steps: a stream for it, and what orders that stream and the engine's.

The engine's stream is the current one of the thread that calls; all steps run on it. Three rules keep pages whole:
whatever writes to a page follows all that the engine's stream was given before; whatever may be overwritten from now on
is ahead of what that stream is given next; and what a peer or a person reads is known to be complete. Nothing but
`torch.cuda` is called here, so tests put in a stream of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch


class Mark(Protocol):
    """Some work, and its end."""

    @property
    def done(self) -> bool:
        """Whether it has ended."""
        ...

    @property
    def seconds(self) -> float:
        """How long it took, once `done`."""
        ...

    def wait(self) -> None:
        """Block until it is `done`; any thread may."""
        ...


class Done:
    """See `Mark`: work that had ended when it was asked for, as all on a CPU."""

    done = True
    seconds = 0.0

    def wait(self) -> None:
        """See `Mark`."""


class CudaMark:
    """See `Mark`: what a stream was given between the two records."""

    def __init__(self) -> None:
        self._begin = torch.cuda.Event(enable_timing=True)
        self._end = torch.cuda.Event(enable_timing=True, blocking=True)

    def begin(self) -> None:
        """The work comes next on the current stream."""
        self._begin.record()

    def end(self) -> None:
        """It has all been given to the current stream."""
        self._end.record()

    @property
    def done(self) -> bool:
        """See `Mark`."""
        return self._end.query()

    @property
    def seconds(self) -> float:
        """See `Mark`."""
        return self._begin.elapsed_time(self._end) / 1000

    def wait(self) -> None:
        """See `Mark`."""
        self._end.synchronize()


class SideStream:
    """A stream of the GPU `device` beside the engine's."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def run(self, work: Callable[[], None]) -> Mark:
        """Queue here what `work` launches. Nothing orders it with the engine's stream but `follow` and `lead`."""
        mark = CudaMark()
        with torch.cuda.stream(self._stream):
            mark.begin()
            work()
            mark.end()
        return mark

    def follow(self) -> None:
        """What is queued here from now on begins when the engine's stream has done all that it was given so far."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def lead(self) -> None:
        """What the engine's stream is given from now on begins when all that was queued here is done. The host does not
        wait."""
        torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def drain(self) -> None:
        """Block until all that was queued here is done."""
        self._stream.synchronize()


def beside(device: torch.device) -> SideStream | None:
    """A side stream of a GPU; None on a CPU, where copies are made at once."""
    return SideStream(device) if device.type == "cuda" else None


def pin(memory: torch.Tensor) -> None:
    """Lock host memory for the rest of this process, so that a GPU can copy from and to it beside its steps.

    Registered, not allocated with `pin_memory=True`: that rounds up to the next power of two. Raises RuntimeError.
    """
    portable = 1
    torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, portable))
