"""Every setting, in one place, typed. `cli/flags.toml` says what each means, for the help of `miniserve serve`."""

import contextlib
import fcntl
import json
import os
import re
import shutil
import tempfile
import tomllib
from argparse import ArgumentTypeError
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import msgspec

Number = TypeVar("Number", int, float)
METHODS = ("gguf", "compressed-tensors", "awq", "gptq", "fp8")
"""The kinds of quantized checkpoints that are served, as vLLM calls them."""
LFS_POINTER = b"version https://git-lfs"
"""How a file begins that stands for a large one in a clone without Git LFS."""


class ConfigError(ValueError, ArgumentTypeError):
    """A setting or a file that cannot work; the message says how to fix it. argparse shows it as it is."""


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


def tables(name: str) -> dict[str, Any]:
    """What a TOML file of the package holds; `name` is its path from here."""
    return tomllib.loads(Path(__file__).parent.joinpath(name).read_text("utf-8"))


PROBLEMS = tables("problems.toml")


def problem(name: str, /, **about: object) -> str:
    """A sentence of problems.toml; `about` are its fields."""
    table, _, key = name.partition(".")
    return str(PROBLEMS[table][key]).format(**about)


def cache_dir() -> Path:
    """What can be made again lies here: $MINISERVE_CACHE, else $XDG_CACHE_HOME/miniserve, else ~/.cache/miniserve."""
    if own := os.environ.get("MINISERVE_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "miniserve"


def make_once(path: Path, make: Callable[[Path], None], whole: Callable[[Path], bool] = Path.exists) -> Path:
    """The file or folder at `path`, which `make` is to write if it is not there or not `whole`. It appears at once, and
    of several processes one makes it. `make` may leave other things beside what it writes. Raises OSError."""
    if whole(path):
        return path
    path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    with (path.parent / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the kernel unlocks when the holder dies
        if whole(path):  # by another process while this one waited
            return path
        for stale in path.parent.glob(".making-*"):  # their makers were killed: this process holds the lock
            shutil.rmtree(stale, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".making-") as work:
            made = Path(work) / "made"
            make(made)
            if path.exists():
                shutil.move(path, Path(work) / "old")
            os.replace(made, path)
    return path


def number(kind: Callable[[str], Number], ok: Callable[[Number], bool], what: str) -> Callable[[str], Number]:
    """A parser of numbers of a `kind` that are `ok`; `what` says which these are."""

    def parse(text: str) -> Number:
        with contextlib.suppress(ValueError):
            if ok(value := kind(text)):
                return value
        raise ConfigError(f"{text!r} is not {what}")

    return parse


parse_positive = number(int, lambda n: n > 0, "a whole number above 0")
parse_port = number(int, lambda n: 0 <= n < 65536, "a port from 0 to 65535")
parse_seconds = number(float, lambda n: 0 <= n < 1e9, "a number of seconds")
parse_fraction = number(float, lambda n: 0 < n <= 1, "a fraction above 0 and at most 1")
parse_share = number(float, lambda n: 0 <= n <= 1, "a share from 0 to 1")
parse_graph_size = number(int, lambda n: 1 <= n <= 512, "a batch size from 1 to 512: write them like 1,2,4,8")
parse_stretch = number(float, lambda n: n == 0 or 1 <= n <= 1000, "0, or a factor from 1")


def parse_tokens(text: str) -> int:
    """A count of tokens: 8192, 8k (8000) or 8K (8192), as in vLLM. Raises `ConfigError`."""
    unit = {"k": 1000, "K": 1024, "m": 10**6, "M": 2**20}.get(text[-1:], 1)
    count = number(float, lambda n: 1 <= n * unit < 2**31, "a number of tokens, like 8192 or 32k")
    return int(count(text[:-1] if unit > 1 else text) * unit)


def parse_bytes(text: str) -> int:
    """Bytes from `2GiB`, `512M`, `1.5g`, `1073741824`. Raises `ConfigError`."""
    m = re.fullmatch(r"([0-9]*\.?[0-9]+)\s*(ki|mi|gi|ti|k|m|g|t|)b?", text.strip().lower())
    if m is None:
        raise ConfigError(f"{text!r} is not a size: write it like 2GiB, 512M or a number of bytes.")
    power = " kmgt".index(m[2][:1] or " ")
    return round(float(m[1]) * (1024 if m[2].endswith("i") else 1000) ** power)


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


def parse_quantization(text: str) -> str | None:
    """`int8` and `int4` are made at load; or a checkpoint's own, as in vLLM; None for `none`. Raises `ConfigError`."""
    method = text.lower().removesuffix("_marlin")
    if method not in ("none", "int8", "int4", *METHODS):
        raise ConfigError(f"{text!r} is not int8, int4 or a checkpoint's own method ({', '.join(METHODS)})")
    return None if method == "none" else method


def parse_root_path(text: str) -> str:
    """A prefix of paths from `/llm`, `llm/` and the like; "" for none."""
    return f"/{text.strip('/')}".rstrip("/")


def parse_devices(text: str) -> list[str]:
    """GPUs from `cuda:0,cuda:1` or `0,1`, as torch calls them. Raises `ConfigError`."""
    found = [re.fullmatch(r"(?:cuda:)?(\d+)", name.strip()) for name in text.split(",")]
    if not all(found):
        raise ConfigError(f"{text!r} names no GPUs: write them like cuda:0,cuda:1 or 0,1.")
    return [f"cuda:{int(m[1])}" for m in found if m]


def parse_graph_sizes(text: str) -> list[int]:
    """Batch sizes from `1,2,4,8`, in order. Raises `ConfigError`."""
    return sorted({parse_graph_size(size) for size in text.split(",")})


class Role(StrEnum):
    """What a worker is for. Both run the same engine."""

    PREFILLER = "prefiller"
    DECODER = "decoder"


class Topology(msgspec.Struct, frozen=True):
    """How many prefillers and decoders: `1P3D`, `2D`. Decoders only is colocated serving."""

    prefillers: int
    decoders: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """From `[nP]mD`. Raises `ConfigError`."""
        m = re.fullmatch(r"(?:(\d+)[pP])?(\d+)[dD]", text.strip())
        if m is None or int(m[2]) < 1:
            raise ConfigError(problem("cli.topology", text=text))
        return cls(int(m[1] or 0), int(m[2]))

    @property
    def roles(self) -> dict[str, Role]:
        """Each worker's role by its name, in start order: prefillers `p0`, `p1`, ... then decoders `d0`, ..."""
        prefillers = {f"p{i}": Role.PREFILLER for i in range(self.prefillers)}
        return prefillers | {f"d{i}": Role.DECODER for i in range(self.decoders)}

    def __str__(self) -> str:
        return (f"{self.prefillers}P" if self.prefillers else "") + f"{self.decoders}D"


class EngineConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What one worker needs to know; travels to the worker process as JSON. Sizes are in bytes, lengths in tokens. None
    means: choose from the model and the machine (`worker/sizing.py`)."""

    model: str
    """In a worker: the folder with config.json (and safetensors unless `load_format` is dummy)."""
    load_format: Literal["auto", "dummy"] = "auto"
    dtype: Literal["auto", "bfloat16", "float16", "float32", "half", "float"] = "auto"
    quantization: Annotated[str | None, parse_quantization] = None
    max_model_len: Annotated[int | None, parse_tokens] = None
    device: str = "auto"
    tensor_parallel_size: Annotated[int, parse_positive] = 1
    threads: Annotated[int, parse_positive] = 0
    cpu_kernels: Literal["auto", "torch"] = "auto"
    prompt_lookup: bool | None = None
    enforce_eager: bool = False
    strict_gpu: bool = False
    cuda_graph_sizes: Annotated[list[Annotated[int, msgspec.Meta(ge=1, le=512)]], parse_graph_sizes] = []
    async_scheduling: bool | None = None
    kv_transfer: Literal["auto", "mapped", "collective"] = "auto"
    kv_cache_memory: Annotated[int | None, parse_bytes] = None
    gpu_memory_utilization: Annotated[float, parse_fraction] = 0.9
    block_size: Annotated[int, parse_positive] = 16
    max_num_batched_tokens: Annotated[int | None, parse_tokens] = None
    max_num_seqs: Annotated[int, parse_positive] = 256
    step_stretch: Annotated[float | None, parse_stretch] = None
    enable_prefix_caching: bool = True
    swap_space: Annotated[int, parse_swap] = 0
    kv_disk: str | None = None
    kv_disk_size: Annotated[int, parse_swap] = 16 << 30
    kv_eviction: Literal["expected", "lru"] = "expected"
    handoff_deadline: Annotated[float, parse_seconds] = 30.0
    role: Role = Role.DECODER
    workers: int = 1
    """How many workers share this machine's memory and cores, each rank counted as one."""
    sharing: int = 1
    """How many of them run on this worker's device: on a GPU each may use its share of `gpu_memory_utilization`."""

    def fall_back(self, what: str) -> str:
        """A worker is to serve with `what`, which is less than the GPU could do; raises `ConfigError` if it may not."""
        if self.strict_gpu:
            raise ConfigError(problem("worker.strict_gpu", what=what))
        return what


class ServeConfig(msgspec.Struct, frozen=True, kw_only=True):
    """All settings of `miniserve serve`."""

    topology: Annotated[Topology | None, Topology.parse] = None
    policy: str = "observe"
    decision_log: str | None = None
    mispredict: Annotated[float, parse_share] = 0.0
    engine: EngineConfig
    devices: Annotated[list[str], parse_devices] = []
    launcher: Literal["local", "ray"] = "local"
    ray_address: str = "auto"
    placement: Literal["SPREAD", "PACK", "STRICT_SPREAD", "STRICT_PACK"] = "SPREAD"
    advertise_host: str = ""
    worker_timeout: Annotated[float, parse_seconds] = 120.0
    """One that loads again may have longer (`cluster/health.py`)."""
    revision: str | None = None
    served_model_names: list[str] = []
    chat_template: str | None = None
    tool_call_parser: str = "auto"
    reasoning_parser: str = "auto"
    generation_config: Literal["auto", "vllm"] = "auto"
    normalize_prompts: bool = True
    conversation_headers: list[str] = []
    log_prompts: bool = False
    sse_ping: Annotated[float, parse_seconds] = 5.0
    host: str = "127.0.0.1"
    port: Annotated[int, parse_port] = 8000
    uds: str | None = None
    root_path: Annotated[str, parse_root_path] = ""
    allowed_origins: Annotated[list[str], parse_origins] = []
    api_key: str | None = None
    max_num_queued_reqs: Annotated[int, parse_positive] = 1024
    shutdown_timeout: Annotated[float, parse_seconds] = 30.0
    log_level: Literal["debug", "info", "warning", "error"] = "warning"
    max_body_bytes: int = 32 * 2**20
