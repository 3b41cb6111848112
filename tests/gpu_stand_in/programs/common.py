"""Engines on the stand-in's device."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch

from miniserve.config import EngineConfig
from miniserve.hub import resolve as hub
from miniserve.model import weights
from miniserve.sampling_params import SamplingParams
from miniserve.worker.build import Built, build
from miniserve.worker.engine import Engine
from scripts.gpu.common import add, random_prompts

# Nothing computes with weights here: the device's memory for them is taken, and nothing is written there.
weights.random = lambda config: lambda name, shape: torch.empty(shape, dtype=config.dtype, device="cuda")

folder = cache(lambda: Path(tempfile.mkdtemp(prefix="models-")))


def model(preset: str, layers: int, **other: Any) -> str:
    """A folder with the config of a preset, but so few layers."""
    known = hub.presets()[preset]
    config = known["config"] | {"num_hidden_layers": layers} | other
    return str(hub.dummy_folder(folder(), preset, {**known, "config": config}))


def engine(preset: str, layers: int, shape: dict[str, Any] | None = None, **settings: Any) -> Built:
    """An engine on the device, with what `shape` says in place of what the config of the preset does."""
    settings = {"kv_cache_memory": 2**31, **settings}  # several engines, one after the other, in one process
    config = EngineConfig(model=model(preset, layers, **shape or {}), device="cuda", load_format="dummy", **settings)
    built = build(config)
    assert built.facts.kernels == "flashinfer", built.facts.kernels
    return built


def begin(engine: Engine, turns: list[str], prompts: list[list[int]], params: SamplingParams) -> None:
    """Queue turns, and step until each has its first token and all decode."""
    for turn, prompt in zip(turns, prompts, strict=True):
        add(engine, turn, prompt, params)
    waiting = set(turns)
    while waiting:
        engine.admit()
        waiting -= {output.turn for output in engine.step().outputs}


def fresh(count: int, length: int, seed: int) -> list[list[int]]:
    """Prompts that share no prefix, of tokens that each preset has."""
    return random_prompts(count, length, 20000, seed)


def tokens_come(engine: Engine) -> None:
    """Step until tokens come: with overlap those of the step before."""
    while not engine.step().outputs:
        pass


def end(engine: Engine, turns: list[str]) -> None:
    """Abort turns, and let what is under way end."""
    for turn in turns:
        engine.abort(turn)
    while engine.has_work:
        engine.step()
