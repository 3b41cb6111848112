"""Every setting, in one place, typed. Flag names are vLLM's wherever vLLM has one."""

from __future__ import annotations

import os
import re
from enum import Enum
from pathlib import Path
from typing import Literal

import msgspec

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


class ConfigError(ValueError):
    """A setting that cannot work; the message says how to fix it."""


def cache_dir() -> Path:
    """What can be made again lies here: $MINISERVE_CACHE, else $XDG_CACHE_HOME/miniserve, else ~/.cache/miniserve."""
    if own := os.environ.get("MINISERVE_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "miniserve"


def parse_bytes(text: str) -> int:
    """Bytes from `2GiB`, `512M`, `1.5g`, `1073741824`. Raises `ConfigError`."""
    m = re.fullmatch(r"([0-9]*\.?[0-9]+)\s*(ki|mi|gi|k|m|g|)b?", text.strip().lower())
    if m is None:
        raise ConfigError(f"{text!r} is not a size: write it like 2GiB, 512M or a number of bytes.")
    return round(float(m[1]) * _UNITS[m[2]])


def format_bytes(size: int, *, up: bool = False) -> str:
    """`size` as `parse_bytes` reads it, with two digits after the point at most; `up` never names less."""
    unit, name = next(((unit, name) for unit, name in ((2**30, "GiB"), (2**20, "MiB")) if size >= unit), (2**10, "KiB"))
    hundredths = -(-size * 100 // unit) if up else size * 100 // unit
    return f"{hundredths / 100:.2f}".rstrip("0").rstrip(".") + name


def parse_devices(text: str) -> list[str]:
    """GPUs from `cuda:0,cuda:1` or `0,1`, as torch calls them. Raises `ConfigError`."""
    found = [re.fullmatch(r"(?:cuda:)?(\d+)", name.strip()) for name in text.split(",")]
    if not all(found):
        raise ConfigError(f"{text!r} names no GPUs: write them like cuda:0,cuda:1 or 0,1.")
    return [f"cuda:{int(m[1])}" for m in found if m]


class Role(Enum):
    PREFILLER = "prefiller"
    DECODER = "decoder"


class Topology(msgspec.Struct, frozen=True):
    """How many prefillers and decoders: `1P3D`, `2D`. Decoders only is colocated serving."""

    prefillers: int
    decoders: int

    @classmethod
    def parse(cls, text: str) -> Topology:
        """From `[nP]mD`. Raises `ConfigError`."""
        m = re.fullmatch(r"(?:(\d+)[pP])?(\d+)[dD]", text.strip())
        if m is None or int(m[2]) < 1:
            raise ConfigError(
                f"{text!r} is not understood: write prefillers and decoders like 1D, 2D, 1P1D or 1P3D "
                "(at least one decoder)."
            )
        return cls(int(m[1] or 0), int(m[2]))

    @property
    def workers(self) -> list[str]:
        """Names in start order: prefillers `p0`, `p1`, ... then decoders `d0`, ..."""
        return [f"p{i}" for i in range(self.prefillers)] + [f"d{i}" for i in range(self.decoders)]

    @staticmethod
    def role(worker: str) -> Role:
        """The role of a worker, by the name that `workers` gave it."""
        return Role.PREFILLER if worker.startswith("p") else Role.DECODER

    def __str__(self) -> str:
        return (f"{self.prefillers}P" if self.prefillers else "") + f"{self.decoders}D"


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What one worker needs to know; travels to the worker process as JSON.

    Sizes are in bytes, lengths in tokens. None means: choose from the model and the machine (`worker/sizing.py`).
    """

    model: str
    """Folder with config.json (and safetensors unless `load_format` is dummy)."""
    load_format: str = "auto"
    dtype: str = "auto"
    device: str = "auto"
    max_model_len: int | None = None
    block_size: int = 16
    kv_cache_memory: int | None = None
    gpu_memory_utilization: float = 0.9
    max_num_batched_tokens: int | None = None
    max_num_seqs: int = 256
    step_stretch: float | None = None
    """How many times longer than a lone stream's step one may take in which prompts are computed beside streams; 0: as
    long as `max_num_batched_tokens` makes it. A server leaves None to its policy; else it means 0."""
    enable_prefix_caching: bool = True
    swap_space: int = 0
    """Bytes of host memory for KV that was evicted from the pool."""
    kv_eviction: Literal["expected", "lru"] = "expected"
    """`expected`: the KV that is needed least goes first; `lru`: the least recently used."""
    cpu_kernels: str = "auto"
    """`auto`: compiled at first use where there is a compiler; `torch`: without them."""
    prompt_lookup: bool | None = None
    """Whether tokens are drafted from a conversation's own ones; None: on a CPU."""
    enforce_eager: bool = False
    """Without CUDA graphs."""
    async_scheduling: bool | None = None
    """Whether the host prepares a step while the device runs the one before; None: on a GPU."""
    threads: int = 0
    """CPU threads of this worker; 0: all cores shared out among the workers."""
    workers: int = 1
    """How many workers share this machine's memory and cores."""
    sharing: int = 1
    """How many of them run on this worker's device: on a GPU each may use its share of `gpu_memory_utilization`."""
    kv_transfer: str = "auto"
    """How KV travels between workers: `mapped`, `collective`, or `auto`, which is mapped where that is possible."""
    handoff_deadline: float = 30.0
    """Seconds a worker keeps pages for another after publishing them, and waits for another's."""


class ServeConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Everything `miniserve serve` can be told."""

    engine: EngineConfig
    topology: Topology | None = None
    """None: 1D on one device, 1P(N-1)D on N of them."""
    devices: list[str] = []
    """GPUs like `cuda:0` for the workers, one after the other in turns; none: all that can be seen, or what
    `engine.device` names."""
    policy: str = "observe"
    served_model_names: list[str] = []
    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    chat_template: str | None = None
    tool_call_parser: str = "auto"
    """The format of the model's tool calls; `auto`: found from its chat template, else from its architecture."""
    reasoning_parser: str = "auto"
    """The marks around the model's reasoning; `auto`: found from its chat template and vocabulary."""
    generation_config: str = "auto"
    """`auto`: the model's generation_config.json gives the sampling defaults; `vllm`: neutral defaults."""
    max_num_queued_reqs: int = 1024
    max_body_bytes: int = 32 * 2**20
    shutdown_timeout: float = 30.0
    worker_timeout: float = 120.0
    """Seconds without a sign of life after which a worker is ended and started again. Longer than any step; one that
    loads again may have longer (`cluster/health.py`)."""
    decision_log: str | None = None
    """A file that gets each placement decision and what came of it, as JSON lines."""
    mispredict: float = 0.0
    """Share of the decisions of the policy `ampd` that are turned around, to study wrong predictions."""
    log_level: str = "warning"
