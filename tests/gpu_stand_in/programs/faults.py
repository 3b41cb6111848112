"""What an engine says when CUDA refuses one of its first allocations, on the device or of pinned memory."""

from __future__ import annotations

import gc
import json
import os
from typing import Any

import torch

from miniserve.config import EngineConfig
from miniserve.worker.build import Built, build, warm_up
from tests.gpu_stand_in.programs.common import model
from tests.support.fake_cuda.device import let_fail, logged, refused

SHAPE = {"hidden_size": 512, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 128, "vocab_size": 32000}
CALLS = {"alloc": "cudaMalloc", "host": "cudaHostAlloc"}
ALL_LATER = 10**6
TRIED = 7
"""So many of the calls of a kind are let fail, each with all later ones."""


def started() -> Built:
    """An engine that has served its first tokens, with swap space."""
    folder = model("llama-3-8b", 2, **SHAPE)
    config = {"max_model_len": 512, "kv_cache_memory": 2**24, "swap_space": 2**22}
    built = build(EngineConfig(model=folder, device="cuda", load_format="dummy", **config))
    warm_up(built.engine, b"root")
    return built


def main() -> None:
    with logged() as log:
        started()
    found: dict[str, Any] = {}
    kept: list[Exception] = []  # torch aborts the process when a graph is deleted that could not be recorded
    for fault, call in CALLS.items():
        calls = sum(line.what.startswith(call) for line in log.of("M"))
        found[fault] = []
        for after in range(0, calls, -(-calls // TRIED)):
            gc.collect()
            torch.cuda.empty_cache()
            torch._C._host_emptyCache()
            before = refused()
            let_fail(fault, after, ALL_LATER)
            try:
                said = f"works with {started().facts.kernels}"
            except Exception as error:
                kept.append(error)
                said = f"{type(error).__name__}: {error}"
            let_fail(fault, 0, 0)
            if refused() > before:
                found[fault].append(said.replace("\n", " "))
    print(json.dumps(found), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
