"""CUDA graphs of decode steps: a few hundred kernels launched by one call.

A graph is recorded for a batch size and replayed with other numbers in the same tensors, so a batch is padded to the
next size of a ladder. The rows that are added decode a token at position 0 of the pool's scratch page and slot.
"""

import ctypes
from bisect import bisect_left
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch

from miniserve.model.transformer import Transformer
from miniserve.ops.cuda_plan import MOST_DECODES
from miniserve.ops.decoder import Batch, State

LADDER = (1, 2, 4, *range(8, 64, 8), *range(64, 128, 16), *range(128, MOST_DECODES + 1, 32))
"""Batch sizes that are recorded by default: at most a fifth of the rows is padding, from 32 on."""

Replay = Callable[[], None]


@runtime_checkable
class GraphOps(Protocol):
    """What a graph needs of `Ops` besides: a plan whose tensors stay where they are."""

    records_mixtures: bool
    """Whether the products of experts can be recorded: where torch has no kernel for them the host waits for counts."""

    def fixed_plan(self, size: int, kv: torch.Tensor, state: State | None, tables: int) -> Any:
        """A plan for decodes of `size` sequences, with `tables` page numbers at most."""

    def fill(self, plan: Any, batch: Batch, kv: torch.Tensor) -> None:
        """Set it to `batch`, of `size` decodes or fewer."""


@dataclass(frozen=True)
class Recorded:
    """A graph, and the tensors it reads."""

    plan: Any
    tokens: torch.Tensor
    positions: torch.Tensor
    replay: Replay


class CudaRecorder:
    """Records with `torch.cuda.CUDAGraph`. All graphs share one pool of memory: only one runs at a time, in one
    stream."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        # One, since torch has only 32 of them, and gives them out again to others after that.
        self._side = torch.cuda.Stream()

    def __call__(self, compute: Callable[[], object]) -> Replay:
        """What is lazily initialised must be so before the graph: hence the first run beside it."""
        self._side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._side):
            compute()
        torch.cuda.current_stream().wait_stream(self._side)
        graph = torch.cuda.CUDAGraph()
        # Other threads of this process may call CUDA meanwhile: only ours must not do what cannot be recorded.
        recording = torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local")
        try:
            with torch.cuda.stream(torch.cuda.current_stream()), recording:
                compute()
        except RuntimeError:
            # If CUDA gave it up, torch takes it for still under way; the outer context has come back to our stream.
            # And torch ends the process when a graph is deleted that it had no memory to begin: this one never is.
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(graph))
            with suppress(RuntimeError):
                torch._C._cuda_endAllocateToPool(self._side.device.index, self._pool)
            raise
        return graph.replay


@dataclass(eq=False)
class DecodeGraphs:
    """Records a graph of each size, before anything is served: each takes tenths of a second. `record` makes a replay
    of what a function does."""

    transformer: Transformer
    ops: GraphOps
    kv: torch.Tensor
    state: State | None
    sizes: list[int]
    max_pages: int
    """Batches of as many sequences as the last of the `sizes`, in order, with up to so many pages each are replayed."""
    record: Callable[[Callable[[], object]], Replay] = field(default_factory=CudaRecorder)

    def __post_init__(self) -> None:
        # One for all sizes: each graph would keep logits of its own, in all a gigabyte for a large vocabulary.
        vocab = self.transformer.config.vocab_size
        self._logits = torch.zeros((self.sizes[-1], vocab), dtype=torch.float32, device=self.kv.device)
        # The largest first: the others find room in what it has taken.
        self.recorded = {size: self._make(size) for size in reversed(self.sizes)}

    def logits(self, batch: Batch) -> torch.Tensor | None:
        """float32 `[len(batch.lengths), vocab]`, valid until the next call; None for a batch that no graph is for."""
        count = len(batch.lengths)
        # Not for prompts, of which a piece may be one token, but then not all rows are wanted.
        if count > self.sizes[-1] or not len(batch.tokens) == len(batch.outputs) == count:
            return None
        size = self.sizes[bisect_left(self.sizes, count)]
        recorded = self.recorded[size]
        recorded.tokens[:count].copy_(batch.tokens)
        recorded.positions[:count].copy_(batch.positions)
        recorded.positions[count:].zero_()
        self.ops.fill(recorded.plan, batch, self.kv)
        recorded.replay()
        return self._logits[:count]

    def _make(self, size: int) -> Recorded:
        plan = self.ops.fixed_plan(size, self.kv, self.state, size * self.max_pages)
        tokens, positions = torch.zeros((2, size), dtype=torch.int64, device=self.kv.device)
        replay = self.record(lambda: self._logits[:size].copy_(self.transformer.compute(plan, tokens, positions, None)))
        return Recorded(plan, tokens, positions, replay)
