"""FlashInfer's own `plan` of batches of every preset, in the workspace that `CudaPlanner` makes for it.

Planning is the host's part, the same for each size of heads. So where FlashInfer has no compiled
module for a model's heads or windows here, that for heads of 128 plans; but not a decode without tensor cores, which is
compiled for its heads."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import flashinfer.decode
import flashinfer.prefill
import torch

from miniserve.hub import resolve as hub
from miniserve.hub.check import check_folder
from miniserve.model.config import ModelConfig
from miniserve.ops import cuda_plan
from miniserve.ops.cuda_ops import CudaOps
from miniserve.ops.cuda_plan import CudaPlan, CudaPlanner
from miniserve.ops.decoder import Batch, Sizes
from miniserve.worker.graphs import APPENDS, LADDER, SEQUENCES
from tests.gpu_stand_in.programs.common import folder

DEVICE = torch.device("cuda", 0)
PAGE, PAGES = 16, 4000
COMPILED = {64: 64, 128: 128, 256: 128}
"""The heads of the module that plans for heads."""
LONG = PAGE * PAGES
EAGER = {
    "decodes": ([1] * 1000, [1024] * 1000),
    "long decodes": ([1] * 256, [LONG] * 256),
    "one long decode": ([1], [LONG]),
    "a prompt": ([8192], [8192]),
    "its last piece": ([8192], [LONG]),
    "short prompts": ([32] * 256, [32] * 256),
    "one append": ([67], [16451]),
    "appends": ([67] * 100, [9000] * 100),
    "two tokens each": ([2] * 512, [4000] * 512),
    "mixed": ([1] * 255 + [4000], [500] * 255 + [LONG]),
    "mixed appends": ([1] * 200 + [17] * 80, [30000] * 280),
}


def planning(module: Callable[..., Any], heads_at: int, window_at: int) -> Callable[..., Any]:
    """A module for planning, where the one that is asked for is not compiled."""

    def get(*arguments: Any) -> Any:
        given = list(arguments)
        for at in (heads_at, heads_at + 1):
            given[at] = COMPILED[given[at]]
        given[window_at] = False
        return module(*given)

    return get


def batch(lengths: list[int], contexts: list[int]) -> Batch:
    rows = torch.empty(sum(lengths), dtype=torch.int64, device=DEVICE)
    pages = [list(range(-(-context // PAGE))) for context in contexts]
    return Batch(rows, rows, rows[:0], lengths, contexts, pages)


def shapes(plan: CudaPlan) -> list[list[int]]:
    """Blocks, tiles and places of partial sums, which a graph keeps as they were when it was recorded."""
    return [list(wrapper._plan_info) for wrapper in plan.prefill.values()]


def refused(planner: CudaPlanner, kv: torch.Tensor) -> Iterator[str]:
    """What FlashInfer's `plan` says where it cannot: for a graph of each size, which are filled with short and with
    long contexts, and for eager steps."""

    def tried(name: str, plan: Callable[[], object]) -> Iterator[str]:
        try:
            plan()
            torch.cuda.synchronize()  # in an engine the step before has ended when the next plan takes its buffers
        except Exception as error:
            yield f"{name}: {str(error).strip().splitlines()[-1][:200]}"

    for size in LADDER:
        made: list[Any] = []
        make = partial(planner.fixed_plan, size, kv, None, PAGES)
        yield from tried(f"graph of {size}", lambda make=make, made=made: made.append(make()))
        for context in (1, 1000, LONG) if made else ():
            decodes = batch([1] * size, [context] * size)
            yield from tried(f"graph of {size} over {context}", partial(planner.fill, made[0], decodes, kv))
    for rows in APPENDS:
        plan: list[Any] = []
        make = partial(planner.fixed_plan, rows, kv, None, PAGES, SEQUENCES)
        yield from tried(f"appends of {rows}", lambda make=make, plan=plan: plan.append(make()))
        shape = shapes(plan[0]) if plan else None
        for lengths in ([1], [rows], [rows - 3], [2] * 8, [1] * 15 + [rows - 15], [rows // 16] * 16) if plan else ():
            for context in (rows, 1000, LONG):
                few = batch(lengths, [context] * len(lengths))
                yield from tried(f"appends of {rows}: {lengths}", partial(planner.fill, plan[0], few, kv))
                if shapes(plan[0]) != shape:
                    yield f"appends of {rows}: {lengths}: other launches than were recorded"
    for kept in (planner._fresh, {}):
        planner._fresh = kept
        for name, (lengths, contexts) in EAGER.items():
            yield from tried(name, partial(planner.plan, batch(lengths, contexts), kv))


OTHERS = [(64, 8, 128), (64, 4, 128), (96, 8, 128), (40, 8, 128), (48, 1, 128), (71, 1, 64), (14, 2, 64), (12, 12, 64)]
"""Heads of queries and of keys, and their size, as other models have them."""


def swept(sizes: Sizes) -> list[str]:
    """What `refused` finds for a model."""
    kv_heads = sizes.kv_heads or sizes.heads
    kv = torch.empty((PAGES + 1, 1, 2, PAGE, kv_heads, sizes.head_dim), dtype=torch.bfloat16, device=DEVICE)
    return list(refused(CudaOps(DEVICE, torch.bfloat16, sizes), kv))


def main() -> None:
    found = {}
    flashinfer.prefill.get_batch_prefill_module = planning(flashinfer.prefill.get_batch_prefill_module, 5, 8)
    flashinfer.decode.get_batch_prefill_module = flashinfer.prefill.get_batch_prefill_module
    for name, preset in hub.presets().items():
        files = check_folder(hub.dummy_folder(folder(), name, preset), True)
        sizes = ModelConfig.from_hf(files.config).sizes
        found[name] = swept(sizes)
    for heads, kv_heads, dim in OTHERS:
        found[f"{heads}, {kv_heads}, {dim}"] = swept(Sizes(heads, dim, [], kv_heads=kv_heads))
    enough = cuda_plan.workspace_bytes
    cuda_plan.workspace_bytes = lambda *of: enough(*of) // 2
    found["half a workspace"] = swept(Sizes(32, 128, [], kv_heads=8))
    print(json.dumps(found))


if __name__ == "__main__":
    main()
