"""What all checks share: their settings, the figures they give, and the models they run."""

from __future__ import annotations

import gc
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from miniserve.config import EngineConfig
from miniserve.hub import resolve as hub
from miniserve.sampling_params import SamplingParams
from miniserve.worker.build import Built, build
from miniserve.worker.engine import Engine
from miniserve.worker.sequence import Sequence

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Figure:
    """A number that a check found, and what it must be: `rule` is `<=`, `>=` or `==` against `limit`, or empty for a
    number that is only reported."""

    name: str
    value: float | str
    unit: str = ""
    rule: str = ""
    limit: float | str = 0.0

    @property
    def ok(self) -> bool:
        """Whether it is within its limit. Not a number is within none."""
        if not self.rule:
            return True
        if self.rule == "==":
            return self.value == self.limit
        value, limit = float(self.value), float(self.limit)
        return value <= limit if self.rule == "<=" else value >= limit


Figures = Iterator[Figure]
"""A check gives its figures one by one, so that those before an error are known."""


@dataclass
class Setting:
    """Where the checks run. `small` makes everything toy-sized; `folder` is for files that may go afterwards."""

    device: str
    small: bool
    folder: Path
    kept: dict[str, Any] = field(default_factory=dict)
    """What a check has found or made and later ones use again."""

    @property
    def cuda(self) -> bool:
        """Whether figures of speed mean anything."""
        return self.device.startswith("cuda")

    @property
    def half(self) -> torch.dtype:
        """The dtype that serves: bf16, or fp32 on a CPU that has no bf16."""
        from miniserve.ops.torch_ops import native_bf16

        return torch.bfloat16 if self.cuda or native_bf16() else torch.float32

    def sync(self) -> None:
        """Wait for the device."""
        if self.cuda:
            torch.cuda.synchronize()

    def keep(self, name: str, make: Callable[[], Any]) -> Any:
        """What `make` makes, once."""
        if name not in self.kept:
            self.kept[name] = make()
        return self.kept[name]

    def release(self) -> None:
        """Give back what is only cached, so that other processes find the memory."""
        gc.collect()
        if self.cuda:
            torch.cuda.empty_cache()


# --- models in the shape of real ones -------------------------------------------------------------------------------

SMALL = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "vocab_size": 2048}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "bos_token_id": 1, "eos_token_id": 2}
CONTEXT = 40960
"""Llama 3's own context is 8,192 tokens, too short for some checks; the length changes nothing else of its shape."""


def model_folder(run: Setting, preset: str) -> Path:
    """A folder with the config of a preset and no weights, for `load_format="dummy"`."""
    known = hub.presets()[preset]
    config = known["config"] | {"max_position_embeddings": CONTEXT}
    generation = known["generation_config"]
    if run.small:
        config |= SMALL
        generation = {"bos_token_id": 1, "eos_token_id": 2}
    return hub.dummy_folder(run.folder, preset, {"config": config, "generation_config": generation})


def shaped(run: Setting, preset: str, **engine: Any) -> Built:
    """An engine with random weights in the shape of `preset`. One at a time: the memory of another is given back."""
    key = f"{preset} {sorted(engine.items())}"
    if run.kept.get("engine") != key:
        run.kept.pop("built", None)
        run.release()
        settings: dict[str, Any] = {"dtype": "bfloat16" if run.cuda else "auto", "load_format": "dummy"}
        if run.small:
            settings |= {"kv_cache_memory": 2**26, "threads": 1}
        folder = str(model_folder(run, preset))
        run.kept["built"] = build(EngineConfig(model=folder, device=run.device, **settings | engine))
        run.kept["engine"] = key
    return run.kept["built"]


def drop_engine(run: Setting) -> None:
    """Give back the memory of the last `shaped` engine."""
    run.kept.pop("built", None)
    run.kept.pop("engine", None)
    run.release()


# --- driving an engine ----------------------------------------------------------------------------------------------


def greedy(max_tokens: int) -> SamplingParams:
    """Exactly `max_tokens` of the likeliest tokens."""
    return SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)


def random_prompts(count: int, length: int, vocab: int, seed: int) -> list[list[int]]:
    """Prompts that share no prefix, but by chance."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab, (count, length), generator=generator).tolist()


def add(engine: Engine, turn: str, tokens: list[int], params: SamplingParams, seed: int = 0) -> None:
    """Queue a turn."""
    engine.add(Sequence(turn, tokens, params, seed, b"gpu-check"))


def busy(engine: Engine) -> bool:
    """Whether a step would do something, or something waits for one."""
    return engine.has_work or bool(engine.waiting)


def drain(engine: Engine) -> dict[str, list[int]]:
    """Step until nothing is left to do; the tokens of each turn."""
    found: dict[str, list[int]] = {}
    while busy(engine):
        engine.admit()
        for output in engine.step().outputs:
            found.setdefault(output.turn, []).extend(output.tokens)
    return found


def abort(engine: Engine, turns: list[str]) -> None:
    """End turns."""
    for turn in turns:
        engine.abort(turn)


# --- processes ------------------------------------------------------------------------------------------------------


def environment() -> dict[str, str]:
    """Of a process that shall find miniserve where we found it, and ask the network for nothing."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}


def seconds(work: Callable[[], object], run: Setting, repeats: int, warm: int = 1) -> float:
    """How long `work` takes with the device's part of it: the median."""
    for _ in range(warm):
        work()
    times = []
    for _ in range(repeats):
        run.sync()
        begun = time.perf_counter()
        work()
        run.sync()
        times.append(time.perf_counter() - begun)
    return sorted(times)[len(times) // 2]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file."""
    return json.loads(path.read_text())
