"""What an engine does where CUDA refuses to record graphs, FlashInfer to attend, or CUDA IPC to share a pool."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from miniserve.config import ConfigError, EngineConfig
from miniserve.kv.memory import KVMemory
from miniserve.model.transformer import Transformer
from miniserve.worker.build import Built, build, warm_up
from tests.gpu_stand_in.programs.common import model
from tests.support.fake_cuda.device import let_fail

SHAPE = {"hidden_size": 512, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 128, "vocab_size": 32000}
ALL_LATER = 10**6
compute = Transformer.compute


def started(**settings: Any) -> Built | str:
    """An engine that has served its first tokens, or why there is none."""
    config = {"max_model_len": 512, "kv_cache_memory": 2**24, "max_num_seqs": 8, **settings}
    folder = model("llama-3-8b", 2, **SHAPE)
    try:
        built = build(EngineConfig(model=folder, device="cuda", load_format="dummy", **config))
    except ConfigError as error:
        return str(error)
    warm_up(built.engine, b"root")
    return built


def without_graphs(fault: str) -> dict[str, Any]:
    """In the recording of the third size the host waits for the device, which CUDA does not allow, or there is no
    memory."""
    sizes: list[int] = []

    def refused(self: Transformer, plan: Any, tokens: torch.Tensor, *more: Any) -> torch.Tensor:
        if torch.cuda.is_current_stream_capturing():
            sizes.append(len(tokens))
            if len(sizes) == 3 and fault == "waits":
                torch.cuda.current_stream().synchronize()
            elif len(sizes) == 3:
                let_fail("alloc", 0, ALL_LATER)
                try:
                    torch.empty(2**32, dtype=torch.uint8, device="cuda")
                finally:
                    let_fail("alloc", 0, 0)
        return compute(self, plan, tokens, *more)

    stream = torch.cuda.current_stream()
    with patch.object(Transformer, "compute", refused):
        strict = started(strict_gpu=True)
        sizes.clear()
        built = started()
    assert isinstance(built, Built), built
    same = torch.cuda.current_stream() == stream
    let_fail("alloc", 0, 1)
    torch.empty(
        2**32, dtype=torch.uint8, device="cuda"
    )  # no recording is under way: torch gives back what it has, and tries again
    return {"kernels": built.facts.kernels, "strict": strict, "sizes": sizes, "same stream": same}


def shared(built: Built) -> list[Any]:
    """Which GPUs can read the pool of an engine, and why there are none."""
    handle = KVMemory(built.memory.shape, 4, torch.device("cuda", 0)).info("").cuda
    assert handle is not None
    return [handle.reach, handle.refused]


def main() -> None:
    found: dict[str, Any] = {fault: without_graphs(fault) for fault in ("waits", "no memory")}
    found["without FlashInfer"] = started(dtype="float32", strict_gpu=True)
    built = started(strict_gpu=True)
    assert isinstance(built, Built), built
    found["fine"] = built.facts.kernels
    found["shared"] = shared(built)
    Path(os.environ["FAKE_CUDA_FAULT"]).write_text("ipc 0 -1")
    found["not mapped"] = shared(built)
    Path(os.environ["FAKE_CUDA_FAULT"]).unlink()
    with patch.object(torch.UntypedStorage, "_share_cuda_", side_effect=RuntimeError("operation not supported")):
        found["not exported"] = shared(built)
    print(json.dumps(found), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
