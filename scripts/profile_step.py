#!/usr/bin/env python3
"""Where the milliseconds of a worker's step go on a CPU: one decode, 16 decodes, a chunk of a prompt.

Each operation of the model is timed by itself, with what it costs to call it from Python; what is left of a step is
scheduling, batches and sampling. Below it the same step as it is served, all of the model in one call where that is
possible, and what a plain read of the weights takes in the same run. Medians.

    scripts/profile_step.py smollm2-135m [--threads 2] [--steps 15] [--context 512] [--kernels torch]
"""

from __future__ import annotations

import os
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any
from unittest.mock import patch
from zlib import crc32

from miniserve.cluster.launch import DEFAULTS

os.environ.update(DEFAULTS | os.environ)  # as a worker has it, and read when torch is imported

import torch

from miniserve import ops
from miniserve.config import EngineConfig
from miniserve.hub import resolve as hub
from miniserve.kv.hashing import root_hash
from miniserve.ops.cpu_ops import CpuOps
from miniserve.ops.quantized import Weight
from miniserve.ops.steps import Steps
from miniserve.sampling_params import SamplingParams
from miniserve.worker import build as building
from miniserve.worker.engine import Engine
from miniserve.worker.sequence import Sequence
from scripts.harness import flags, medians, write
from tests.support.native_kernels import NativeKernels

READ_BYTES = 1 << 28
"""Much more than a cache holds, as the weights of most models are."""
NAMES = ("rms_norm", "rope", "attention", "plan")


class Timed(Steps):
    """Ops that count their seconds. A matrix has the name of its place in a layer."""

    def __init__(self, inner: ops.StepOps) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._inner = inner
        self._made = 0
        vars(self).update({name: self._timed(name, getattr(inner, name)) for name in NAMES})

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def linear(self, weight: Weight, bias: torch.Tensor | None = None) -> Any:
        name = ("qkv", "out", "down")[self._made % 3]
        self._made += 1
        return self._timed(f"matrix: {name}", self._inner.linear(weight, bias))

    def gated(self, weight: Weight, bias: torch.Tensor | None = None, activation: str = "silu") -> Any:
        return self._timed("matrix: gate and up", self._inner.gated(weight, bias, activation))

    def head(self, weight: Weight) -> Any:
        return self._timed("matrix: head", self._inner.head(weight))

    def _timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            begun = time.perf_counter()
            result = function(*arguments)
            self.seconds[name] += time.perf_counter() - begun
            return result

        return call


def read_speed() -> float:
    """Bytes a second of a plain read by all threads, the best of some: what memory gives."""
    block = torch.ones(READ_BYTES // 8, dtype=torch.int64)
    times = []
    for _ in range(9):
        begun = time.perf_counter()
        block.max()
        times.append(time.perf_counter() - begun)
    return READ_BYTES / min(times)


def until_idle(engine: Engine) -> None:
    while engine.has_work:
        engine.admit()
        engine.step()


def add(engine: Engine, layout: str, name: str, length: int, outputs: int) -> None:
    """Queue a prompt of tokens that depend on its name."""
    seed = crc32(name.encode())
    tokens = torch.randint(100, 20_000, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    params = SamplingParams(temperature=0.0, max_tokens=outputs, ignore_eos=True)
    engine.add(Sequence(name, tokens, params, 0, root_hash(layout)))


def measure(
    built: building.Built, timed: Timed | None, decodes: int, context: int, chunk: int, steps: int
) -> dict[str, float]:
    """Medians of the milliseconds of a step, by name: `decodes` at `context` tokens, or a prompt of `chunk`."""
    engine, rows = built.engine, []
    for number in range(decodes):
        add(engine, built.layout, f"decode {decodes} {number}", context, steps + 20)
    while len(engine.running) < decodes or engine.queued_prefill_tokens:
        engine.admit()
        engine.step()
    for number in range(steps):
        if chunk:
            add(engine, built.layout, f"chunk {number}", chunk, 1)
        engine.admit()
        if timed is not None:
            timed.seconds.clear()
        begun = time.perf_counter()
        engine.step()
        whole = time.perf_counter() - begun
        parts = dict(timed.seconds) if timed is not None else {}
        rows.append({**parts, "host": whole - sum(parts.values()), "step": whole})
    until_idle(engine)
    return {name: 1e3 * seconds for name, seconds in medians(rows).items()}


def main() -> None:
    parser = flags(__doc__)
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--kernels", choices=("auto", "torch"), default="auto")
    arguments = parser.parse_args()
    holder: list[Timed] = []

    def make_ops(*args: Any, **kwargs: Any) -> tuple[Any, str]:
        inner, says = ops.make_ops(*args, **kwargs)
        holder.append(Timed(NativeKernels(inner) if isinstance(inner, CpuOps) else inner))
        return holder[0], says

    config = EngineConfig(
        model=str(hub.resolve(arguments.model).folder),
        threads=arguments.threads,
        cpu_kernels=arguments.kernels,
        max_num_batched_tokens=512,
        step_stretch=0.0,
        prompt_lookup=False,
    )
    with patch.object(building, "make_ops", make_ops):
        built = building.build(config)
    print(built.facts.kernels, built.facts.dtype, f"{built.facts.threads} threads")
    cases = {"1 decode": (1, 0), "16 decodes": (16, 0), "prompt of 512": (0, 512)}

    def columns(built: building.Built, timed: Timed | None) -> dict[str, dict[str, float]]:
        return {
            name: measure(built, timed, decodes, arguments.context, chunk, arguments.steps)
            for name, (decodes, chunk) in cases.items()
        }

    reads = [read_speed()]
    parts = columns(built, holder[0])
    whole = columns(building.build(config), None)
    reads.append(read_speed())
    names = sorted({name for column in parts.values() for name in column} - {"host", "step"})
    print(f"\n| ms | {' | '.join(cases)} |\n|---|{'---|' * len(cases)}")
    for name in [*names, "host", "step"]:
        says = {"host": "the rest of the step", "step": "step, operation by operation"}.get(name, name)
        print(f"| {says} | " + " | ".join(f"{column.get(name, 0.0):.2f}" for column in parts.values()) + " |")
    print("| step as it is served | " + " | ".join(f"{column['step']:.2f}" for column in whole.values()) + " |")
    read = built.facts.weights_bytes / max(reads) * 1e3
    print(
        f"\nA plain read: {max(reads) / 1e9:.1f} GB/s (before {reads[0] / 1e9:.1f}, after {reads[1] / 1e9:.1f}). "
        f"The weights, {built.facts.weights_bytes / 1e6:.0f} MB, take {read:.1f} ms to read, "
        f"{100 * read / whole['1 decode']['step']:.0f} % of the step of one decode."
    )
    write(arguments.json, {"parts_ms": parts, "whole_ms": whole, "read_bytes_per_second": reads})


if __name__ == "__main__":
    main()
