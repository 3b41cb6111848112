"""CUDA graphs of small steps: a few hundred kernels launched by one call.

A graph is recorded for a number of rows and replayed with other numbers in the same tensors, so a batch is padded to
the next size of a ladder: one for decodes alone, one for a few sequences that append to what is cached, perhaps beside
decodes. The rows that are added write to position 0 of the pool's scratch page and slot.
"""

import ctypes
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
APPENDS, SEQUENCES = (16, 32, 64, 128, 256), 16
"""Rows of appends that are recorded, and of how many sequences at most: a decode among them is attended as a prompt is,
by tiles of up to 128 rows, which take time with many decodes. `workspace_bytes` says how far both may go."""

Replay = Callable[[], None]


@runtime_checkable
class GraphOps(Protocol):
    """What a graph needs of `Ops` besides: a plan whose tensors stay where they are."""

    records_mixtures: bool
    """Whether the products of experts can be recorded: where torch has no kernel for them the host waits for counts."""

    def fixed_plan(self, rows: int, kv: torch.Tensor, state: State | None, longest: int, sequences: int = 0) -> Any:
        """A plan for so many decodes, or so many `rows` of up to `sequences`; each has `longest` pages at most."""

    def fill(self, plan: Any, batch: Batch, kv: torch.Tensor) -> None:
        """Set it to `batch`, of as many rows and sequences or fewer."""


@dataclass(frozen=True)
class Recorded:
    """A graph, and the tensors it reads. Without `outputs` logits of all rows are wanted."""

    plan: Any
    tokens: torch.Tensor
    positions: torch.Tensor
    outputs: torch.Tensor | None
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
class StepGraphs:
    """Records a graph of each size, before anything is served: each takes tenths of a second. `record` makes a replay
    of what a function does."""

    transformer: Transformer
    ops: GraphOps
    kv: torch.Tensor
    state: State | None
    sizes: list[int]
    sequences: int
    max_pages: int
    """Of decodes alone as many as the last of the `sizes`, in order, are replayed; appends of up to so many `sequences`
    (0: none), no more than that; with up to so many pages each."""
    record: Callable[[Callable[[], object]], Replay] = field(default_factory=CudaRecorder)

    def __post_init__(self) -> None:
        # One for all sizes: each graph would keep logits of its own, in all a gigabyte for a large vocabulary.
        vocab = self.transformer.config.vocab_size
        self._logits = torch.zeros((self.sizes[-1], vocab), dtype=torch.float32, device=self.kv.device)
        # The largest first: the others find room in what it has taken.
        self.decodes = {size: self._make(size) for size in reversed(self.sizes)}
        self.appends = {rows: self._make(rows, self.sequences) for rows in reversed(APPENDS) if self.sequences}

    def logits(self, batch: Batch) -> torch.Tensor | None:
        """float32 `[len(batch.outputs), vocab]`, valid until the next call; None for a batch that no graph is for."""
        count, rows, wanted = len(batch.lengths), len(batch.tokens), len(batch.outputs)
        # Not all of the rows of a prompt are wanted, of which a piece may be one token.
        made = self.decodes if rows == wanted == count else self.appends
        size = min((size for size in made if size >= rows), default=0)
        if not size or (made is self.appends and max(count, wanted) > self.sequences):
            return None
        recorded = made[size]
        recorded.tokens[:rows].copy_(batch.tokens)
        recorded.positions[:rows].copy_(batch.positions)
        recorded.positions[rows:].zero_()
        if recorded.outputs is not None:
            recorded.outputs[:wanted].copy_(batch.outputs)
        self.ops.fill(recorded.plan, batch, self.kv)
        recorded.replay()
        return self._logits[:wanted]

    def _make(self, rows: int, sequences: int = 0) -> Recorded:
        plan = self.ops.fixed_plan(rows, self.kv, self.state, self.max_pages, sequences)
        tokens, positions = torch.zeros((2, rows), dtype=torch.int64, device=self.kv.device)
        outputs = torch.zeros_like(tokens[:sequences]) if sequences else None
        logits, inputs = self._logits[: sequences or rows], (plan, tokens, positions, outputs)
        return Recorded(*inputs, self.record(lambda: logits.copy_(self.transformer.compute(*inputs))))
