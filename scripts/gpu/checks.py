"""The table of checks, in the order in which they run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from scripts.gpu import ceilings, handoff, kernels, parity, parts, servers, speed
from scripts.gpu.common import Figures, Setting
from scripts.gpu.parity import ARCHITECTURES
from tests.support.tiny import DENSE


@dataclass(frozen=True)
class Check:
    """A named check. Those of the group `correctness` are judged on any device. It is ended after `seconds`."""

    name: str
    group: str
    function: Callable[[Setting], Figures]
    seconds: float = 60.0


BF16, FP32 = torch.bfloat16, torch.float32

CORRECTNESS = [
    *(Check(f"kernels {kind}", "correctness", partial(kernels.attention, kind=kind)) for kind in kernels.BATCHES),
    Check("kernels windows", "correctness", partial(kernels.attention, kind="mixed", window=30)),
    Check("kernels experts", "correctness", parts.experts),
    Check("kernels state", "correctness", parts.state),
    Check("kernels between", "correctness", kernels.between),
    Check("kernels products", "correctness", kernels.products),
    *(
        Check(f"parity {arch} {kernels.short(dtype)}", "correctness", partial(parity.parity, arch=arch, dtype=dtype))
        for arch in ARCHITECTURES
        for dtype in (FP32, BF16)
        if dtype is BF16 or arch in DENSE  # fp32 runs on the torch kernels, which tests know
    ),
    *(Check(f"modes {kernels.short(d)}", "correctness", partial(parity.modes, dtype=d)) for d in (FP32, BF16)),
    Check("sampling", "correctness", parity.sampling),
    Check("ipc", "correctness", handoff.same_bytes),
    Check("nccl", "correctness", handoff.same_bytes_by_nccl),
    Check("topologies", "correctness", servers.topologies, 90),
]
LLAMA, QWEN = speed.LLAMA, "qwen3-0.6b"

SPEED = [
    Check("ceilings", "speed", ceilings.check),
    Check(f"decode {LLAMA}", "speed", partial(speed.decode, preset=LLAMA), 90),
    Check(f"prefill {LLAMA}", "speed", partial(speed.prefill, preset=LLAMA)),
    Check(f"append {LLAMA}", "speed", partial(speed.append, preset=LLAMA)),
    Check(f"host {LLAMA}", "speed", partial(speed.host, preset=LLAMA)),
    Check(f"handoff {LLAMA}", "speed", partial(handoff.speed, preset=LLAMA)),
    Check("benchmark", "speed", speed.benchmark, 90),
    Check("transformers beside", "speed", speed.transformers_beside, 120),
    Check(f"decode {QWEN}", "speed", partial(speed.decode, preset=QWEN)),
    Check(f"prefill {QWEN}", "speed", partial(speed.prefill, preset=QWEN)),
    Check(f"append {QWEN}", "speed", partial(speed.append, preset=QWEN)),
    Check(f"host {QWEN}", "speed", partial(speed.host, preset=QWEN)),
    Check(f"graphs {QWEN}", "speed", partial(speed.graphs, preset=QWEN)),
    Check(f"handoff {QWEN}", "speed", partial(handoff.speed, preset=QWEN)),
]
REPLAY = [Check(f"replay {t}", "replay", partial(servers.replay, topology=t), 90) for t in ("1P1D", "2D")]
CHECKS = [*CORRECTNESS, *SPEED, *REPLAY]
