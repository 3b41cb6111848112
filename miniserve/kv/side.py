"""A CUDA stream for copies beside the engine's steps, and what orders the two streams.

The engine's stream is the current one of the calling thread; all steps run on it. Three rules keep pages whole: a write
to a page comes after all work that the engine's stream was given before (`follow`); a copy of memory that may be
overwritten from now on comes before the work that the engine's stream is given next (`lead`); and what a peer or a
person reads is complete (`Fence`). This file calls `torch.cuda` alone, so tests replace the stream with their own.
"""

from collections.abc import Callable

import torch


class CudaFence:
    """The end of what `work` launches on the current stream, between two events."""

    def __init__(self, work: Callable[[], None]) -> None:
        self._begin = torch.cuda.Event(enable_timing=True)
        self._end = torch.cuda.Event(enable_timing=True, blocking=True)
        self._begin.record()
        work()
        self._end.record()

    @property
    def done(self) -> bool:
        return self._end.query()

    @property
    def seconds(self) -> float:
        """How long the work took, once `done`."""
        return self._begin.elapsed_time(self._end) / 1000

    def wait(self) -> None:
        """Block until the work is `done`; any thread may call this."""
        self._end.synchronize()


class PassedFence:
    """The end of work that has ended already, as all work on a CPU has when its call returns."""

    done = True
    seconds = 0.0

    def wait(self) -> None:
        """Return at once."""


Fence = CudaFence | PassedFence


def passing(device: torch.device) -> Fence:
    """The end of all that the engine's stream of the device was given so far."""
    return CudaFence(lambda: None) if device.type == "cuda" else PassedFence()


class SideStream:
    """A stream of the GPU `device` beside the engine's."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def run(self, work: Callable[[], None]) -> Fence:
        """Queue on this stream what `work` launches. Only `follow` and `lead` order it with the engine's stream."""
        with torch.cuda.stream(self._stream):
            return CudaFence(work)

    def follow(self) -> None:
        """Work that is queued here from now on begins when the engine's stream has done all it was given so far."""
        self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def lead(self) -> None:
        """Work that the engine's stream is given from now on waits there for all that was queued here."""
        torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def drain(self) -> None:
        self._stream.synchronize()


def copy_pages(source: torch.Tensor, froms: list[int], target: torch.Tensor, tos: list[int]) -> None:
    """Give the current stream the copies of `source[froms[i]]` to `target[tos[i]]`, at least one. On one GPU these are
    a few kernels for all pages, which load four elements at a time."""
    torch._foreach_copy_([target[page] for page in tos], [source[page] for page in froms], non_blocking=True)


def pin(memory: torch.Tensor) -> None:
    """Lock host memory for the rest of this process, so that a GPU can copy from and to it beside its steps. It is
    registered, not allocated with `pin_memory=True`, which rounds up to a power of two. Raises RuntimeError."""
    portable = 1
    torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, portable))
