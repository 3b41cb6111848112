"""Page tables on a GPU and FlashInfer's plans over them: for all layers of a step, or to stay for a CUDA graph."""

from array import array
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, chain
from typing import Any

import torch
from torch import Tensor

from miniserve.ops.decoder import Batch, Sizes, State

MOST_DECODES = 512
"""Of one CUDA graph."""
FRESH = 1024
"""Rows of prompts, with nothing before them, from which on FlashAttention-3 may pay for a few kernels more a layer."""
TENSOR_CORE_GROUP = 4
"""Query heads that share a key head, from which on a decode is faster by tensor cores (FlashInfer's advice)."""


@dataclass(frozen=True)
class CudaPlan:
    """A batch as the kernels read it: its first `decodes` rows are one token each of as many sequences, and `decode`
    attends them; `prefill` attends the others, of which it reads new keys and values as they are if they are `fresh`:
    no prompt has tokens before its new ones. Both have a wrapper for each window, or none. All tensors are int32 on the
    device.

    `places` are where new keys and values go, as FlashInfer calls them. Sequence i has pages `kv_indices[kv_indptr[i] :
    kv_indptr[i + 1]]`, with `kv_last_page_len[i]` tokens in the last one; row r is of sequence `batch_indices[r]`, at
    `positions[r]`. Sequence i has rows `starts[i]` to `starts[i + 1]`; if the model has a recurrent `state`, its own is
    in slot `slots[i]`.
    """

    layers: list[tuple[Tensor, Tensor]]
    decodes: int
    decode: dict[int, Any]
    prefill: dict[int, Any]
    places: dict[str, Tensor]
    starts: Tensor
    state: State | None
    slots: Tensor
    fresh: bool = False


def page_tables(
    contexts: list[int], pages: list[list[int]], page_tokens: int
) -> tuple[list[int], list[int], list[int]]:
    """`kv_indptr`, `kv_last_page_len` and `kv_indices`, as in `CudaPlan`, of sequences with so many tokens, the new
    ones included."""
    counts = [-(-context // page_tokens) for context in contexts]
    last = [(context - 1) % page_tokens + 1 for context in contexts]
    indices = list(chain.from_iterable(table[:count] for table, count in zip(pages, counts, strict=True)))
    return [0, *accumulate(counts)], last, indices


def workspace_bytes(heads: int, kv_heads: int, head_dim: int, processors: int) -> int:
    """What FlashInfer's FA2 takes at most for the partial sums of a split attention, on a GPU with so many
    multiprocessors: `PrefillPlan` and `PrefillSplitQOKVIndptr` in its attention/scheduler.cuh (0.6). A prompt is split
    into no more blocks than run at once; a graph of decodes has room for a tile of each sequence besides, and one of
    appends for fewer numbers, as long as it has no more than 256 rows and 32 sequences."""
    group, blocks = heads // kv_heads, 2 * processors // kv_heads
    widest = 128 if head_dim < 256 else 64
    tile = min(widest, next((rows for rows in (16, 64) if group <= rows), 128))
    tiles = -(-MOST_DECODES * group // tile) + MOST_DECODES - 1
    rows = max(widest * blocks, tile * max(blocks, tiles))
    return 4 * heads * rows * (head_dim + 1) + 2**10  # a sum for each number of a row; both parts are aligned


class CudaPlanner:
    """Plans attention with FlashInfer's wrappers over pools of `dtype`: one for each of the model's windows. Scores are
    multiplied with `scale`. `fi` is the module flashinfer."""

    def __init__(self, fi: Any, device: torch.device, dtype: torch.dtype, sizes: Sizes) -> None:
        self.scale = sizes.scale or sizes.head_dim**-0.5
        self._fi = fi
        self._device = device
        self._dtype = dtype
        self._heads, self._kv_heads, self._dim = sizes.heads, sizes.kv_heads or sizes.heads, sizes.head_dim
        self._pinned = device.type == "cuda"
        processors = torch.cuda.get_device_properties(device).multi_processor_count if self._pinned else 1
        room = workspace_bytes(self._heads, self._kv_heads, self._dim, processors)
        # FlashInfer wants zeros there before the first use. Steps run one after the other, so they can share it.
        self._workspace = torch.zeros(room if self._pinned else 2**10, dtype=torch.uint8, device=device)
        self._windows = sorted(sizes.windows)
        self._prefill = self._prefill_wrappers()
        self._fresh = self._fresh_wrappers()
        self._decode: dict[int, Any] = {}
        self._planned: torch.cuda.Event | None = None

    def plan(self, batch: Batch, kv: Tensor, state: State | None = None) -> CudaPlan:
        """Page tables on the device, and what FlashInfer plans of them on the host."""
        size, count = kv.shape[3], len(batch.lengths)
        decodes = next((i for i, length in enumerate(batch.lengths) if length > 1), count)
        indptr, last, indices = page_tables(batch.contexts, batch.pages, size)
        split = indptr[decodes]
        parts = {
            "kv_indptr": indptr,
            "kv_last_page_len": last,
            "kv_indices": indices,
            "batch_indices": [i for i, length in enumerate(batch.lengths) for _ in range(length)],
            "starts": [0, *accumulate(batch.lengths)],
            "slots": batch.slots,
            "prefills": [0, *accumulate(batch.lengths[decodes:])],
            "later": [at - split for at in indptr[decodes:]],
            "contexts": batch.contexts[decodes:],
        }
        numbers, sizes = self._host(list(chain(*parts.values()))), [len(part) for part in parts.values()]
        host = dict(zip(parts, numbers.split(sizes), strict=True))
        made = dict(zip(parts, numbers.to(self._device, non_blocking=True).split(sizes), strict=True))
        self._begin_planning()
        if decodes:
            self._decode = self._decode or self._decode_wrappers(kv)
            begins, lasts = host["kv_indptr"][: decodes + 1], host["kv_last_page_len"][:decodes]
            self._plan_decode(self._decode, kv, indptr=begins, indices=made["kv_indices"][:split], last_page_len=lasts)
        prompts = batch.contexts[decodes:]
        fresh = bool(self._fresh) and sum(prompts) >= FRESH and prompts == batch.lengths[decodes:]
        if fresh:
            ends = host["prefills"]
            self._fresh[0].plan(qo_indptr=ends, kv_indptr=ends, head_dim_qk=self._dim, causal=True, **self._shape(kv))
        elif prompts:
            self._plan_prefill(
                self._prefill,
                kv,
                qo_indptr=host["prefills"],
                paged_kv_indptr=host["later"],
                paged_kv_indices=made["kv_indices"][split:],
                paged_kv_last_page_len=host["kv_last_page_len"][decodes:],
                seq_lens=host["contexts"],
            )
        self._end_planning()
        wrappers = self._decode if decodes else {}, self._fresh if fresh else self._prefill if prompts else {}
        names = "kv_indptr", "kv_last_page_len", "kv_indices", "batch_indices"
        places = {name: made[name] for name in names} | {"positions": batch.positions.int()}
        return CudaPlan(_views(kv), decodes, *wrappers, places, made["starts"], state, made["slots"], fresh)

    def fixed_plan(self, rows: int, kv: Tensor, state: State | None, longest: int, sequences: int = 0) -> CudaPlan:
        """A plan whose tensors stay where they are, to be filled: for decodes of as many sequences as `rows`, or, as if
        all were prompts, for pieces of prompts and decodes of up to `sequences`. Each has up to `longest` pages."""
        numbers = partial(torch.zeros, dtype=torch.int32, device=self._device)
        count = sequences + 1 if sequences else rows
        starts = numbers(count + 1) if sequences else torch.arange(count + 1, dtype=torch.int32, device=self._device)
        places = {
            "kv_indptr": numbers(count + 1),
            "kv_last_page_len": numbers(count),
            "kv_indices": numbers(count * longest + rows),
            "batch_indices": numbers(rows) if sequences else starts[:rows],
            "positions": numbers(rows),
        }
        name = "paged_{}_buf" if sequences else "paged_{}_buffer"
        fixed = {name.format(part): places[part] for part in places if part.startswith("kv")}
        if sequences:
            decode, prefill = {}, self._prefill_wrappers(use_cuda_graph=True, qo_indptr_buf=starts, **fixed)
        else:
            decode, prefill = self._decode_wrappers(kv, use_cuda_graph=True, **fixed), {}
        plan = CudaPlan(_views(kv), 0 if sequences else rows, decode, prefill, places, starts, state, numbers(count))
        nothing = numbers(0)
        self.fill(plan, Batch(nothing, nothing, nothing, [], [], []), kv)
        return plan

    def fill(self, plan: CudaPlan, batch: Batch, kv: Tensor) -> None:
        """Set a fixed plan to `batch`, of as many rows and sequences or fewer. Decodes that are left over have the last
        slot. Beside prompts the rows that are left over are one more prompt, so that there are always as many: with
        that and the number of sequences FlashInfer plans launches of the same shape."""
        count, rows, scratch = len(batch.contexts), len(batch.positions), kv.shape[0] - 1
        more, left = len(plan.places["kv_last_page_len"]) - count, len(plan.places["positions"]) - rows
        contexts, lengths = [*batch.contexts, *[1] * more], []
        if plan.prefill:
            contexts[-1], lengths = max(left, 1), [*batch.lengths, *[0] * (more - 1), left]
        tables = page_tables(contexts, [*batch.pages, *[[scratch] * max(left, 1)] * more], kv.shape[3])
        sequences = [i for i, length in enumerate(lengths) for _ in range(length)]
        parts = *tables, [0, *accumulate(lengths)], contexts, sequences
        numbers = self._host(list(chain(*parts))).split([len(part) for part in parts])
        indptr, last, indices, starts, seq_lens, batch_indices = numbers
        plan.places["positions"][:rows].copy_(batch.positions)
        plan.places["positions"][rows:].zero_()
        if plan.state is not None:
            plan.slots.copy_(self._host([*batch.slots, *[len(plan.state.delta) - 1] * more]), non_blocking=True)
        self._begin_planning()
        # It copies them into the tensors that it was made with.
        indices = indices.to(self._device, non_blocking=True)
        if plan.prefill:
            plan.places["batch_indices"].copy_(batch_indices, non_blocking=True)
            new = {"qo_indptr": starts, "seq_lens": seq_lens}
            paged = {"paged_kv_indptr": indptr, "paged_kv_indices": indices, "paged_kv_last_page_len": last}
            self._plan_prefill(plan.prefill, kv, **new, **paged)
        else:
            self._plan_decode(plan.decode, kv, indptr=indptr, indices=indices, last_page_len=last)
        self._end_planning()

    def _decode_wrappers(self, kv: Tensor, **fixed: Any) -> dict[int, Any]:
        tensor_cores = self._heads // kv.shape[4] >= TENSOR_CORE_GROUP
        made = partial(self._fi.BatchDecodeWithPagedKVCacheWrapper, self._workspace, kv_layout="NHD", backend="fa2")
        return {window: made(use_tensor_cores=tensor_cores, **fixed) for window in self._windows}

    def _prefill_wrappers(self, **fixed: Any) -> dict[int, Any]:
        made = partial(self._fi.BatchPrefillWithPagedKVCacheWrapper, self._workspace, kv_layout="NHD", backend="fa2")
        return {window: made(**fixed) for window in self._windows}

    def _fresh_wrappers(self) -> dict[int, Any]:
        """FlashAttention-3, where there are GPUs and heads that FlashInfer has compiled it for."""
        there = not self._pinned or torch.cuda.get_device_capability(self._device)[0] == 9
        if not there or self._dim != 128 or self._windows != [0]:
            return {}
        return {0: self._fi.BatchPrefillWithRaggedKVCacheWrapper(self._workspace, kv_layout="NHD", backend="fa3")}

    def _plan_decode(self, wrappers: dict[int, Any], kv: Tensor, **tables: Tensor) -> None:
        for window, wrapper in wrappers.items():
            wrapper.plan(**tables, **self._shape(kv), page_size=kv.shape[3], head_dim=self._dim, window_left=window - 1)

    def _plan_prefill(self, wrappers: dict[int, Any], kv: Tensor, **tables: Tensor) -> None:
        more = {"page_size": kv.shape[3], "head_dim_qk": self._dim, "causal": True}
        for window, wrapper in wrappers.items():
            wrapper.plan(**tables, **self._shape(kv), **more, window_left=window - 1)

    def _shape(self, kv: Tensor) -> dict[str, Any]:
        return {
            "num_qo_heads": self._heads,
            "num_kv_heads": kv.shape[4],
            "sm_scale": self.scale,
            "q_data_type": self._dtype,
            "kv_data_type": self._dtype,
        }

    def _host(self, numbers: list[int]) -> Tensor:
        # By way of an array, which takes a list of thousands of numbers in a third of the time that a tensor does.
        host = torch.empty(len(numbers), dtype=torch.int32, pin_memory=self._pinned)
        return host.copy_(torch.frombuffer(array("i", numbers), dtype=torch.int32))

    def _begin_planning(self) -> None:
        """A plan copies from a pinned buffer of its wrapper, which the next one must not write before that has ended.
        It nearly always has: it is the first thing that a step does on the device."""
        if self._planned is not None:
            self._planned.synchronize()

    def _end_planning(self) -> None:
        if self._pinned:
            self._planned = self._planned or torch.cuda.Event()
            self._planned.record()


def _views(kv: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of each layer, `[page, slot, kv_head, head_dim]`."""
    return list(zip(kv[:, :, 0].unbind(1), kv[:, :, 1].unbind(1), strict=True))
