"""The table of checks by stage, in the order in which they begin. A check's function is named, not imported: a module
that does not load then fails its own checks alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from importlib import import_module
from typing import Any

from scripts.gpu.setting import Figures, Setting


class Kind(StrEnum):
    """What a check is about: correctness is judged on any device, speed on a GPU alone."""

    CORRECTNESS = "correctness"
    SPEED = "speed"


def call(name: str, *args: Any, **kwargs: Any) -> Any:
    """What the function `module:name` returns."""
    module, function = name.split(":")
    return getattr(import_module(module), function)(*args, **kwargs)


@dataclass(frozen=True)
class Check:
    """A named check: `function` is `module:name`. It is ended after `seconds` and has then failed. `look` is what to
    look at first when it fails."""

    name: str
    kind: Kind
    function: str
    seconds: float
    look: str
    arguments: dict[str, Any] = field(default_factory=dict)

    def run(self, setting: Setting) -> Figures:
        """Its figures."""
        return call(self.function, setting, **self.arguments)


@dataclass(frozen=True)
class Stage:
    """Checks that run within `seconds` in all, in so many `processes` side by side. Each process calls `prepare`
    (`module:name`), which imports what takes long, before the clock of its first check starts."""

    name: str
    seconds: float
    checks: list[Check]
    prepare: str = "scripts.gpu.common:ready"
    processes: int = 1


def correct(name: str, function: str, seconds: float, look: str, **arguments: Any) -> Check:
    """A check of correctness, its function below scripts/gpu."""
    return Check(name, Kind.CORRECTNESS, f"scripts.gpu.{function}", seconds, look, arguments)


def fast(name: str, function: str, seconds: float, look: str, **arguments: Any) -> Check:
    """A check of speed, likewise."""
    return Check(name, Kind.SPEED, f"scripts.gpu.{function}", seconds, look, arguments)


ATTENTION = "ops/cuda_plan.py: plan() (indptrs, lengths of last pages); CudaOps.attention: strides of a layer's pages"
INSTALLED = "wheels and FLASHINFER_* variables (docs/gpu.md); a module that is missing is compiled or refused"
PARTS = "CudaOps' call of that kernel in ops/cuda_ops.py: argument names, dtype, what is written in place"
LAYERS = "ops/cuda_fused.py, which Triton compiles first; with 40 rows only its kernel of heads is called"
GRAPHS = "worker/graphs.py and fill() in ops/cuda_plan.py: which tensors a recorded plan reads; the planner's event"
IPC = "kv/memory.py: the exported handle; map_pool() in kv/transfer/mapped.py; copy_pages() in kv/side.py"
PATH = "'error of logits': if it is too large a kernel is wrong, if not the engine; 'kernels' says whose they are"
FAMILY = "'kernels experts', 'kernels state' and 'kernels windows': the parts that this family has besides"
WINDOWS = "modules with windows (use_swa_True): torch computes where they are not compiled"
SERVERS = "the server's log in the error; then 'ipc', then worker/handoff.py"
STEP = "'early kernels': what the device's time went to; then 'host': whether it waited"
HOST = "what the host does between two launches: 'step' against 'device at work'"
COPIES = "copy_pages() in kv/side.py: the host's time for its lists against the copies'"
CLOCKS = "another program on the device, or its clocks"
NCCL = "kv/transfer/nccl.py: what its library answered; two ranks on one GPU need NCCL 2.30"

KINDS = "decode", "prefill", "fresh", "mixed"

SMOKE = Stage(
    "smoke",
    90,
    [
        correct("versions", "machine:versions", 20, "what the machine has installed"),
        correct("flashinfer", "machine:flashinfer", 60, INSTALLED),
        *(correct(f"kernels {k}", "kernels:attention", 30, ATTENTION, kind=k) for k in KINDS),
        correct("kernels between", "kernels:between", 20, PARTS),
        correct("kernels products", "kernels:products", 20, PARTS),
        correct("kernels layers", "layers:check", 30, LAYERS),
        correct("ipc", "handoff:same_bytes", 40, IPC),
        fast("early ceilings", "ceilings:check", 15, CLOCKS),
        correct("graphs", "capture:check", 40, GRAPHS),
        fast("early decode", "early:decode", 30, STEP),
        fast("early prefill", "early:prefill", 20, STEP),
        fast("early append", "early:append", 20, STEP),
        fast("early kernels", "early:kernels", 30, "scripts/gpu/trace.py: torch's profiler"),
        fast("early prediction", "early:prediction", 30, STEP),
        fast("early variants", "variants:check", 30, "a choice of FlashInfer's that is not compiled"),
    ],
)
DENSE = ("llama", "qwen2", "qwen3", "mistral")
NEWER = ("mixtral", "qwen3_moe", "qwen3_next", "qwen3_5", "qwen3_5_moe", "gemma3")


def same_text(arch: str, precision: str, look: str = PATH) -> Check:
    """Logits and text of one architecture against transformers'."""
    return correct(f"parity {arch} {precision}", "parity:parity", 60, look, arch=arch, precision=precision)


PARITY = Stage(
    "parity",
    150,
    [
        correct("topologies", "servers:topologies", 120, SERVERS),  # takes longest: the others run beside it
        same_text("llama", "bf16"),
        correct("modes bf16", "parity:modes", 60, GRAPHS, precision="bf16"),
        correct("sampling", "sampling:check", 60, "CudaOps.filter, then worker/sampler.py"),
        *(same_text(arch, "bf16") for arch in DENSE[1:]),
        correct("kernels experts", "parts:experts", 40, "CudaOps.mixture: offsets of rows, torch's grouped product"),
        correct("kernels state", "parts:state", 60, "ops/cuda_delta.py: Triton compiles it first"),
        correct("kernels windows", "kernels:attention", 40, WINDOWS, kind="mixed", window=30),
        correct("modes fp32", "parity:modes", 60, GRAPHS, precision="fp32"),
        *(same_text(arch, "bf16", FAMILY) for arch in NEWER),
        *(same_text(arch, "fp32") for arch in DENSE),  # on the torch kernels, which tests on a CPU know
        correct("nccl", "handoff:same_bytes_by_nccl", 60, NCCL),
    ],
    prepare="scripts.gpu.common:ready_for_transformers",
    processes=4,
)
LLAMA, QWEN = "llama-3-8b", "qwen3-0.6b"
SPEED = Stage(
    "speed",
    240,
    [
        fast("ceilings", "ceilings:check", 15, CLOCKS),
        fast(f"decode {LLAMA}", "speed:decode", 60, STEP, preset=LLAMA),
        fast(f"prefill {LLAMA}", "speed:prefill", 40, STEP, preset=LLAMA),
        fast(f"append {LLAMA}", "speed:append", 40, STEP, preset=LLAMA),
        fast(f"host {LLAMA}", "speed:host", 40, HOST, preset=LLAMA),
        fast(f"handoff {LLAMA}", "handoff:speed", 40, COPIES, preset=LLAMA),
        fast("benchmark", "beside:benchmark", 60, STEP),
        fast("transformers beside", "beside:transformers_beside", 60, "'benchmark', which is what it is compared with"),
        fast(f"decode {QWEN}", "speed:decode", 40, STEP, preset=QWEN),
        fast(f"prefill {QWEN}", "speed:prefill", 30, STEP, preset=QWEN),
        fast(f"append {QWEN}", "speed:append", 30, STEP, preset=QWEN),
        fast(f"host {QWEN}", "speed:host", 30, HOST, preset=QWEN),
        fast(f"graphs {QWEN}", "speed:graphs", 40, STEP, preset=QWEN),
        fast(f"handoff {QWEN}", "handoff:speed", 40, COPIES, preset=QWEN),
        *(fast(f"replay {name}", "servers:replay", 60, SERVERS, topology=name) for name in ("1P1D", "2D")),
    ],
    prepare="scripts.gpu.common:ready_for_transformers",
)
STAGES = [SMOKE, PARITY, SPEED]
