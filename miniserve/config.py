"""Every setting, in one place, typed. A field's `Flag` is its documentation and its flag of `miniserve serve`."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec

Number = TypeVar("Number", int, float)
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


LFS_POINTER = b"version https://git-lfs"
"""How a file begins that stands for a large one in a clone without Git LFS."""


class ConfigError(ValueError):
    """A setting or a file that cannot work; the message says how to fix it."""


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is no such file. Raises `ConfigError`."""
    data = b""
    try:
        data = path.read_bytes()
        if isinstance(found := json.loads(data), dict):
            return found
        raise ValueError("it is not a JSON object")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        if data.startswith(LFS_POINTER):
            raise ConfigError(f"{path} is a Git LFS pointer, not the file itself: run `git lfs pull` there.") from error
        raise ConfigError(f"{path} cannot be read: {error}. Mend it or download it again.") from error


def cache_dir() -> Path:
    """What can be made again lies here: $MINISERVE_CACHE, else $XDG_CACHE_HOME/miniserve, else ~/.cache/miniserve."""
    if own := os.environ.get("MINISERVE_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "miniserve"


# --- values as people write them; each parser raises `ConfigError` --------------------------------------------------


def number(kind: Callable[[str], Number], ok: Callable[[Number], bool], what: str) -> Callable[[str], Number]:
    """A parser of numbers of a `kind` that are `ok`; `what` says which these are."""

    def parse(text: str) -> Number:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not ok(value):
            raise ConfigError(f"{text!r} is not {what}")
        return value

    return parse


parse_positive = number(int, lambda n: n > 0, "a whole number above 0")
parse_port = number(int, lambda n: 0 <= n < 65536, "a port from 0 to 65535")
parse_seconds = number(float, lambda n: 0 <= n < 1e9, "a number of seconds")
parse_fraction = number(float, lambda n: 0 < n <= 1, "a fraction above 0 and at most 1")
parse_share = number(float, lambda n: 0 <= n <= 1, "a share from 0 to 1")
parse_stretch = number(float, lambda n: n == 0 or 1 <= n <= 1000, "0, or a factor from 1")


def parse_tokens(text: str) -> int:
    """A count of tokens: 8192, 8k (8000) or 8K (8192), as in vLLM. Raises `ConfigError`."""
    unit = {"k": 1000, "K": 1024, "m": 10**6, "M": 2**20}.get(text[-1:], 1)
    count = number(float, lambda n: 1 <= n * unit < 2**31, "a number of tokens, like 8192 or 32k")
    return int(count(text[:-1] if unit > 1 else text) * unit)


def parse_bytes(text: str) -> int:
    """Bytes from `2GiB`, `512M`, `1.5g`, `1073741824`. Raises `ConfigError`."""
    m = re.fullmatch(r"([0-9]*\.?[0-9]+)\s*(ki|mi|gi|k|m|g|)b?", text.strip().lower())
    if m is None:
        raise ConfigError(f"{text!r} is not a size: write it like 2GiB, 512M or a number of bytes.")
    return round(float(m[1]) * _UNITS[m[2]])


def parse_swap(text: str) -> int:
    """Bytes, but a bare number below 4096 is in GiB, as in vLLM. Raises `ConfigError`."""
    size = parse_bytes(text)
    return size if text.strip()[-1].isalpha() or size >= 4096 else parse_bytes(f"{text}GiB")


def parse_origins(text: str) -> list[str]:
    """Origins as browsers send them, `*` for all: one, or a JSON list. Raises `ConfigError`."""
    with contextlib.suppress(msgspec.MsgspecError):
        origins = msgspec.json.decode(text, type=list[str]) if text.startswith("[") else [text]
        if all(re.fullmatch(r"\*|[\w+.-]+://[^/\s]+", origin) for origin in origins):
            return origins
    raise ConfigError(f'{text!r} is no origin: write it like http://localhost:3000, or ["https://a.com"], or *.')


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


# --- settings -------------------------------------------------------------------------------------------------------


class Role(StrEnum):
    """What a worker is for. Both run the same engine."""

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
    def roles(self) -> dict[str, Role]:
        """Each worker's role by its name, in start order: prefillers `p0`, `p1`, ... then decoders `d0`, ..."""
        prefillers = {f"p{i}": Role.PREFILLER for i in range(self.prefillers)}
        return prefillers | {f"d{i}": Role.DECODER for i in range(self.decoders)}

    def __str__(self) -> str:
        return (f"{self.prefillers}P" if self.prefillers else "") + f"{self.decoders}D"


KvTransfer = Literal["auto", "mapped", "collective"]

GROUPS = "model", "workers", "memory and batching, of each worker", "server"
"""The titles under which the help lists flags."""


@dataclass(frozen=True)
class Flag:
    """How a setting is written on the command line; `help` documents the setting itself.

    The flag is called --like-the-field unless there are `names`. A bool becomes a switch, a `Literal` choices; `many`
    lets the flag take several values.
    """

    group: str
    help: str
    parse: Callable[[str], Any] = str
    metavar: str | None = None
    names: tuple[str, ...] = ()
    many: bool = False


ModelFlag, WorkersFlag, MemoryFlag, ServerFlag = (partial(Flag, group) for group in GROUPS)


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What one worker needs to know; travels to the worker process as JSON.

    Sizes are in bytes, lengths in tokens. None means: choose from the model and the machine (`worker/sizing.py`).
    """

    model: Annotated[
        str,
        ModelFlag(
            "folder, alias (llama-3-8b, llama-3.1-8b, qwen3-0.6b, qwen3-8b, qwen2.5-7b, mistral-7b, smollm2-135m) or "
            "hub id like Qwen/Qwen3-0.6B; default: smollm2-135m"
        ),
    ]
    """In a worker: the folder with config.json (and safetensors unless `load_format` is dummy)."""
    load_format: Annotated[
        Literal["auto", "dummy"],
        ModelFlag("dummy: random weights of the model's shape, for measuring; default: %(default)s"),
    ] = "auto"
    dtype: Annotated[
        Literal["auto", "bfloat16", "float16", "float32", "half", "float"],
        ModelFlag("default: auto (the model's; on a CPU bf16 only where it is native)"),
    ] = "auto"
    max_model_len: Annotated[
        int | None,
        ModelFlag("most tokens of prompt and output, like 8192 or 32k (32,000; 32K is 32,768)", parse_tokens),
    ] = None
    device: Annotated[str, WorkersFlag("auto, cpu or cuda")] = "auto"
    threads: Annotated[int, WorkersFlag("CPU threads of each worker; default: cores shared", parse_positive)] = 0
    cpu_kernels: Annotated[
        Literal["auto", "torch"],
        WorkersFlag(
            "auto: compiled with this machine's C++ compiler at first use, where it has one; torch: without; "
            "default: %(default)s"
        ),
    ] = "auto"
    prompt_lookup: Annotated[
        bool | None,
        WorkersFlag(
            "draft tokens from what a conversation has said before, and keep those that hold: the same text in fewer "
            "steps; default: on a CPU"
        ),
    ] = None
    enforce_eager: Annotated[bool, WorkersFlag("on a GPU: no CUDA graphs (slower steps, less memory)")] = False
    async_scheduling: Annotated[
        bool | None, WorkersFlag("prepare a step while the device runs the one before; default: on a GPU")
    ] = None
    kv_transfer: Annotated[
        KvTransfer,
        WorkersFlag(
            "how KV travels between workers: mapped (shared memory or CUDA IPC), collective (NCCL between GPUs, Gloo "
            "over TCP loopback on a CPU); auto: mapped where possible; default: %(default)s"
        ),
    ] = "auto"
    kv_cache_memory: Annotated[
        int | None,
        MemoryFlag(
            "size of the KV pool, like 2GiB; default: from the model and what is free",
            parse_bytes,
            "SIZE",
            ("--kv-cache-memory", "--kv-cache-memory-bytes"),
        ),
    ] = None
    gpu_memory_utilization: Annotated[
        float,
        MemoryFlag(
            "of the device's memory (on a CPU: of what is free) that may be used; default: %(default)s",
            parse_fraction,
            "FRACTION",
        ),
    ] = 0.9
    block_size: Annotated[
        int,
        MemoryFlag(
            "tokens in a KV page, on a CPU a multiple of 16 for its own kernels; default: %(default)s", parse_positive
        ),
    ] = 16
    max_num_batched_tokens: Annotated[
        int | None, MemoryFlag("tokens computed in one step; default: 512 on a CPU, 8192 on CUDA", parse_tokens)
    ] = None
    max_num_seqs: Annotated[int, MemoryFlag("sequences that run at once; default: %(default)s", parse_positive)] = 256
    step_stretch: Annotated[
        float | None,
        MemoryFlag(
            "how many times longer than a lone stream's step one may take that computes prompts beside streams; 0: as "
            "long as --max-num-batched-tokens makes it; default: 6 with --policy observe, else 0",
            parse_stretch,
            "FACTOR",
        ),
    ] = None
    enable_prefix_caching: Annotated[bool, MemoryFlag("find KV of known prefixes; default: on")] = True
    swap_space: Annotated[
        int,
        MemoryFlag("host memory for KV that had to leave the pool, like 4GiB or 4; default: none", parse_swap, "SIZE"),
    ] = 0
    kv_eviction: Annotated[
        Literal["expected", "lru"],
        MemoryFlag(
            "expected: the KV that is needed least leaves first, as its conversation was observed; lru: the least "
            "recently used; default: %(default)s"
        ),
    ] = "expected"
    handoff_deadline: Annotated[
        float,
        MemoryFlag(
            "how long a worker keeps finished pages for another, and waits for another's; default: %(default)s",
            parse_seconds,
            "SECONDS",
        ),
    ] = 30.0
    role: Role = Role.DECODER
    workers: int = 1
    """How many workers share this machine's memory and cores."""
    sharing: int = 1
    """How many of them run on this worker's device: on a GPU each may use its share of `gpu_memory_utilization`."""


class ServeConfig(msgspec.Struct, frozen=True, kw_only=True):
    """All settings of `miniserve serve`."""

    topology: Annotated[
        Topology | None,
        WorkersFlag(
            "prefillers and decoders, like 1D, 1P1D, 1P2D; default: 1D on one device, 1P(N-1)D on N GPUs",
            Topology.parse,
        ),
    ] = None
    policy: Annotated[
        str,
        WorkersFlag(
            "observe: every turn where it costs least, by what was measured; conserve: first turns are prefilled by a "
            "prefiller, all else at home; colocated: all at home; disaggregated: every turn is prefilled by a "
            "prefiller; ampd: turn by turn, by the expected first token; default: %(default)s"
        ),
    ] = "observe"
    decision_log: Annotated[
        str | None, WorkersFlag("write each placement decision and what came of it as JSON lines", metavar="FILE")
    ] = None
    mispredict: Annotated[
        float,
        WorkersFlag(
            "with --policy ampd: share of decisions turned around, to study wrong predictions; default: %(default)s",
            parse_share,
            "FRACTION",
        ),
    ] = 0.0
    engine: EngineConfig
    devices: Annotated[
        list[str],
        WorkersFlag(
            "like 0,1 or cuda:0,cuda:1: one worker on each, in turns; workers on one GPU share its memory; "
            "default: all GPUs",
            parse_devices,
            "GPUS",
        ),
    ] = []
    worker_timeout: Annotated[
        float,
        WorkersFlag(
            "a worker that is silent for so long is ended and started again: longer than any step; "
            "default: %(default)s",
            parse_seconds,
            "SECONDS",
        ),
    ] = 120.0
    """One that loads again may have longer (`cluster/health.py`)."""
    revision: Annotated[str | None, ModelFlag("branch, tag or commit on the hub")] = None
    served_model_names: Annotated[
        list[str], ModelFlag("what clients call the model", metavar="NAME", names=("--served-model-name",), many=True)
    ] = []
    chat_template: Annotated[str | None, ModelFlag("a jinja file or text, instead of the model's own")] = None
    tool_call_parser: Annotated[
        str,
        ModelFlag("the model's format of tool calls; default: auto (from its chat template, else its architecture)"),
    ] = "auto"
    reasoning_parser: Annotated[
        str,
        ModelFlag(
            "the marks around the model's reasoning; none: it is left in the content; default: auto (from its chat "
            "template and vocabulary)"
        ),
    ] = "auto"
    generation_config: Annotated[
        Literal["auto", "vllm"],
        ModelFlag("auto: sampling defaults from the model's generation_config.json; vllm: neutral ones"),
    ] = "auto"
    normalize_prompts: Annotated[
        bool,
        ServerFlag("keep Claude Code's billing line, which differs with each request, out of prompts; default: on"),
    ] = True
    sse_ping: Annotated[
        float,
        ServerFlag(
            "a stream that has said nothing for so long sends a comment; 0: never; default: %(default)s",
            parse_seconds,
            "SECONDS",
        ),
    ] = 5.0
    host: Annotated[str, ServerFlag("default: %(default)s (only this machine)")] = "127.0.0.1"
    port: Annotated[int, ServerFlag("default: %(default)s; 0: any free one", parse_port)] = 8000
    uds: Annotated[str | None, ServerFlag("listen at this Unix socket instead of a port", metavar="FILE")] = None
    root_path: Annotated[
        str,
        ServerFlag(
            "a proxy's prefix of all paths, like /llm, whether or not it takes it off",
            lambda text: f"/{text.strip('/')}".rstrip("/"),
            "PATH",
        ),
    ] = ""
    allowed_origins: Annotated[
        list[str],
        ServerFlag("pages whose scripts may ask, like http://a.com:3000; *: all", parse_origins, "ORIGIN", many=True),
    ] = []
    api_key: Annotated[
        str | None, ServerFlag("ask clients for this key; or set MINISERVE_API_KEY (or VLLM_API_KEY)")
    ] = None
    max_num_queued_reqs: Annotated[
        int, ServerFlag("requests that may wait; more get 503 with Retry-After; default: %(default)s", parse_positive)
    ] = 1024
    shutdown_timeout: Annotated[
        float,
        ServerFlag(
            "how long running requests may go on after SIGTERM or Ctrl-C; default: %(default)s",
            parse_seconds,
            "SECONDS",
        ),
    ] = 30.0
    log_level: Annotated[Literal["debug", "info", "warning", "error"], ServerFlag("")] = "warning"
    max_body_bytes: int = 32 * 2**20
