"""What checks share: the models they run, and how an engine is driven."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from miniserve.config import EngineConfig
from miniserve.hub import resolve as hub
from miniserve.sampling_params import SamplingParams
from miniserve.worker.build import Built, build
from miniserve.worker.engine import Engine
from miniserve.worker.sequence import Sequence
from scripts.gpu.setting import Setting

ROOT = Path(__file__).resolve().parents[2]


# --- before the first check of a process ----------------------------------------------------------------------------


def ready(run: Setting) -> None:
    """Make a context on the device: with the imports above it what takes long when a process is new."""
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // 4) if run.cuda else 1)  # four processes share a machine
    if run.cuda:
        torch.zeros(1, device=run.device)
        run.sync()


def ready_for_transformers(run: Setting) -> None:
    """The same, for checks that compare with transformers."""
    import transformers

    transformers.logging.disable_progress_bar()
    ready(run)


# --- models in the shape of real ones -------------------------------------------------------------------------------

SMALL = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "vocab_size": 2048}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "bos_token_id": 1, "eos_token_id": 2}
CONTEXT = 40960
"""Llama 3's own context is 8,192 tokens, too short for some checks; the length changes nothing else of its shape."""


def model_folder(run: Setting, preset: str, layers: int = 0) -> Path:
    """A folder with the config of a preset and no weights, for `load_format="dummy"`; with so many `layers`, or all."""
    known = hub.presets()[preset]
    config = known["config"] | {"max_position_embeddings": CONTEXT}
    generation = known["generation_config"]
    if run.small:
        config |= SMALL
        generation = {"bos_token_id": 1, "eos_token_id": 2}
    elif layers:
        config["num_hidden_layers"] = layers
    return hub.dummy_folder(run.folder, preset, {"config": config, "generation_config": generation})


def shaped(run: Setting, preset: str, layers: int = 0, **engine: Any) -> Built:
    """An engine with random weights in the shape of `preset`. One at a time: the memory of another is given back."""
    key = f"{preset} {layers} {sorted(engine.items())}"
    if run.kept.get("engine") != key:
        drop_engine(run)
        settings: dict[str, Any] = {"dtype": "bfloat16" if run.cuda else "auto", "load_format": "dummy"}
        if run.small:
            settings |= {"kv_cache_memory": 2**26, "threads": 1}
        config = EngineConfig(model=str(model_folder(run, preset, layers)), device=run.device, **settings | engine)
        run.kept["built"] = build(config)
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
