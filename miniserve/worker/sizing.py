"""What a worker chooses from the model and the machine: device, dtype, context, size of the KV pool."""

import ctypes
import json
import os
import re
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Self

import torch

from miniserve.config import ConfigError, EngineConfig, format_bytes, problem
from miniserve.hub.check import Checked, check_folder
from miniserve.kv.memory import KVMemory, PageShape
from miniserve.kv.states import StateMemory, StateShape
from miniserve.model.config import DTYPES, ModelConfig
from miniserve.model.shards import Shard
from miniserve.model.transformer import Transformer
from miniserve.model.weights import QUANTIZATIONS
from miniserve.ops import Ops
from miniserve.ops.torch_ops import native_bf16
from miniserve.sampling_params import SamplingParams
from miniserve.worker.runner import ModelRunner
from miniserve.worker.sequence import Sequence
from miniserve.worker.step import Work

CPU_RUNTIME_BYTES = 700 * 2**20
"""What a worker process takes beside weights and KV: libraries and the activations of a step (measured, 512 tokens)."""
CPU_POOL_TOKENS = 65536
CPU_SNAPSHOTS = 32
"""For so many the pool has room beside these tokens, by default."""
CPU_BATCHED_TOKENS = 512
CUDA_BATCHED_TOKENS = 8192
CUDA_RUNTIME_BYTES = 1200 * 2**20
"""Of CUDA's context, graphs and workspaces on a GPU: a guess (docs/gpu.md)."""


@dataclass(frozen=True)
class Choices:
    """What follows from the settings, the model's files and the machine, before anything large is read. `shard` is
    what this rank has of the model, `budget` the tokens of a step, `swap_pages` the size of the swap space; so many
    `sequences` may run at once. What the settings leave open, the kind of device decides."""

    files: Checked
    shard: Shard
    device: torch.device
    dtype: torch.dtype
    max_model_len: int
    shape: PageShape
    state: StateShape | None
    sequences: int
    budget: int
    swap_pages: int
    overlap: bool
    drafts: bool

    @classmethod
    def of(cls, config: EngineConfig, rank: int) -> Self:
        """Raises `ConfigError`."""
        files = check_folder(Path(config.model), config.load_format == "dummy")
        check_quantization(config.quantization, files.method)
        shard = Shard(ModelConfig.from_hf(files.config), rank, config.tensor_parallel_size)
        model = shard.config
        device = choose_device(config.device, rank)
        dtype = choose_dtype(config.dtype, model, device)
        shape = PageShape(model.kv_layers, config.block_size, model.kv_heads, model.head_dim, dtype)
        recurrent = len(model.layers) - model.kv_layers
        state = StateShape(**vars(model.delta), layers=recurrent, dtype=dtype) if model.delta else None
        on_gpu = device.type == "cuda"
        budget = config.max_num_batched_tokens or (CUDA_BATCHED_TOKENS if on_gpu else CPU_BATCHED_TOKENS)
        overlap = on_gpu if config.async_scheduling is None else config.async_scheduling
        # A recurrent state that has taken in a wrong draft could not be put back.
        drafts = (not on_gpu if config.prompt_lookup is None else config.prompt_lookup) and state is None
        max_model_len = model.max_len if config.max_model_len is None else config.max_model_len
        if max_model_len > model.max_len:
            raise ConfigError(problem("worker.long_context", asked=max_model_len, most=model.max_len))
        if max_model_len < 2:
            raise ConfigError("--max-model-len must be at least 2.")
        slot = state.pages(shape.bytes) * shape.bytes if state else 0
        sequences = choose_sequences(config, slot, device)
        given = files, shard, device, dtype, max_model_len, shape, state, sequences, budget
        return cls(*given, swap_pages(config, shape), overlap, drafts)

    @property
    def snapshot(self) -> int:
        """Pages of a snapshot of recurrent state."""
        return self.state.pages(self.shape.bytes) if self.state else 0

    @property
    def state_bytes(self) -> int:
        """Of the recurrent state of all sequences, on a GPU with a scratch slot."""
        return (self.sequences + (self.device.type == "cuda")) * self.snapshot * self.shape.bytes

    def layout(self, config: EngineConfig, ops: Ops) -> str:
        """A fingerprint of all that pages of two workers must have in common."""
        folder, dtype = str(Path(config.model).resolve()), str(self.dtype)
        made = config.load_format, config.quantization in QUANTIZATIONS and config.quantization
        identity = [folder, self.files.config, dtype, config.block_size, self.shard.ranks, ops.layout, *made]
        return blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=16).hexdigest()


def check_quantization(asked: str | None, method: str) -> None:
    """Raises `ConfigError` where --quantization asks for what files of this `method` are not, and may not become."""
    if method and asked not in (None, method):
        raise ConfigError(problem("worker.quantized_already", method=method, asked=asked))
    if not method and asked is not None and asked not in QUANTIZATIONS:
        raise ConfigError(problem("worker.not_quantized", asked=asked))


def choose_device(name: str, rank: int = 0) -> torch.device:
    """`auto` is CUDA, if any; a `rank` has the GPU so many after the named one. Raises `ConfigError`."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"(cpu|cuda)(:0|:[1-9][0-9]?)?", name):
        raise ConfigError(f"--device {name!r} is not supported: use auto, cpu or cuda.")
    device = torch.device(name)
    if device.type == "cpu":
        return device
    if not torch.cuda.is_available():
        raise ConfigError("--device cuda: this PyTorch sees no CUDA GPU. Use --device cpu, or check the driver.")
    count, index = torch.cuda.device_count(), (device.index or 0) + rank
    if index >= count:
        raise ConfigError(f"There is no cuda:{index}: this PyTorch sees {count} GPUs, from cuda:0 on.")
    return torch.device("cuda", index)


def choose_dtype(name: str, model: ModelConfig, device: torch.device) -> torch.dtype:
    """`auto`: the model's own dtype, but on a CPU bf16 only where its dot products are native, else fp32."""
    if name == "auto":
        if device.type == "cpu":
            half = model.dtype is not torch.float32
            return torch.bfloat16 if half and native_bf16() else torch.float32
        return torch.bfloat16 if model.dtype is torch.float32 else model.dtype
    return DTYPES[{"half": "float16", "float": "float32"}.get(name, name)]


def choose_sequences(config: EngineConfig, slot: int, device: torch.device) -> int:
    """Sequences that run at once: no more than there are slots for a recurrent state, of so many bytes each, in an
    eighth of the memory; 0 bytes: the model has no such state."""
    if not slot:
        return config.max_num_seqs
    total = memory_available() if device.type == "cpu" else torch.cuda.mem_get_info(device)[1]
    share = total * config.gpu_memory_utilization / (config.workers if device.type == "cpu" else config.sharing) / 8
    return max(1, min(config.max_num_seqs, int(share) // slot))


def weight_bytes(model: ModelConfig, dtype: torch.dtype, bits: float | None, head_bits: float | None) -> int:
    """Bytes of all weights, where a number of the layers' matrices takes `bits` with its share of the scales, one of
    the head `head_bits`. With None they have the `dtype`, as the embedding has, which then also is a tied head."""
    plain = 8 * dtype.itemsize
    rows = model.vocab_size * model.hidden_size
    layers = model.num_parameters - rows * (1 if model.tie_embeddings else 2)
    head = 0 if model.tie_embeddings and head_bits is None else rows * (head_bits or plain)
    return int(layers * (bits or plain) + rows * plain + head) // 8


def prepare_cpu(config: EngineConfig) -> int:
    """Set this process's threads and allocator for the CPU; returns the number of threads."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = config.threads or max(1, cores // config.workers)
    torch.set_num_threads(threads)
    keep_freed_memory()
    return threads


def keep_freed_memory() -> None:
    """Tell glibc's malloc to reuse large blocks instead of giving them back to the kernel. Activations are megabytes,
    freed and taken again thousands of times a second; by default each time costs a mmap and its page faults. Measured
    on 2 cores of an EPYC: linears of a 512-token prefill, 457 -> 308 ms."""
    trim_threshold, top_pad, mmap_threshold = -1, -2, -3
    with suppress(OSError, AttributeError):  # with another libc it is only slower
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(mmap_threshold, 2**30)
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(top_pad, 64 * 2**20)


def memory_available() -> int:
    """Bytes this machine, or the container's limit, has left for new processes. What a container counts as used
    includes files that lie in memory unchanged, as weights just downloaded do; those give way."""
    found = []
    with suppress(OSError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        found += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        if limit != "max":
            stat = dict(line.split() for line in Path("/sys/fs/cgroup/memory.stat").read_text().splitlines())
            files = int(stat.get("inactive_file", 0)) + int(stat.get("active_file", 0))
            found.append(int(limit) - int(Path("/sys/fs/cgroup/memory.current").read_text()) + files)
    return min(found) if found else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def size_pool(config: EngineConfig, choices: Choices, weights: int, activations: int = 0) -> tuple[int, str]:
    """Pages in the pool, and the arithmetic in words. `weights` is their size in bytes, loaded already on a GPU, where
    a step takes up to `activations` bytes on top. Raises `ConfigError` if not even one sequence of the longest fits."""
    shape, device, max_model_len = choices.shape, choices.device, choices.max_model_len
    state, snapshot = choices.state_bytes, choices.snapshot
    if config.kv_cache_memory is not None:
        size, how = config.kv_cache_memory, "--kv-cache-memory"
    elif device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        shared = config.sharing > 1
        # Of a GPU that workers share, what is free now says little: the others load at the same time.
        used = torch.cuda.memory_reserved(device) + CUDA_RUNTIME_BYTES if shared else total - free
        used += activations + state
        size = min(int(config.gpu_memory_utilization * total / config.sharing) - used, free)
        rest = f"a step of {format_bytes(activations, up=True)}{', recurrent state' if state else ''} and runtime"
        of = f"{format_bytes(total)} / {config.sharing} workers on {device}" if shared else format_bytes(total)
        how = f"{config.gpu_memory_utilization:.0%} of {of}, less {format_bytes(used, up=True)} for weights, {rest}"
    else:
        available, swap = memory_available(), config.swap_space
        parts = {"weights": weights, "runtime": CPU_RUNTIME_BYTES, "swap space": swap, "recurrent state": state}
        room = int(available * config.gpu_memory_utilization / config.workers) - sum(parts.values())
        less = " - ".join(f"{format_bytes(part)} {what}" for what, part in parts.items() if part)
        want = max(4 * max_model_len, CPU_POOL_TOKENS) * shape.token_bytes + CPU_SNAPSHOTS * snapshot * shape.bytes
        size = min(want, room)
        how = (
            f"{format_bytes(available)} free x {config.gpu_memory_utilization:.2f} / {config.workers} workers "
            f"- {less} = {format_bytes(max(room, 0))}, of which the larger of 4 contexts and {CPU_POOL_TOKENS} tokens "
            "is taken" + (f", and {CPU_SNAPSHOTS} snapshots" if snapshot else "")
        )
    pages = max(size, 0) // shape.bytes
    needed = -(-max_model_len // shape.page_tokens) + snapshot
    if pages < needed:
        fitting = (pages - snapshot) * shape.page_tokens
        ways = [f"--max-model-len {fitting}"] if fitting >= 256 else []
        ways.append(f"--kv-cache-memory {format_bytes(needed * shape.bytes, up=True)}")
        if config.kv_cache_memory is None:
            ways += ["a smaller --max-num-seqs"] if state else []
            ways.append("a smaller model, or fewer workers")
        takes, has, use = format_bytes(needed * shape.bytes), format_bytes(max(size, 0)), " or ".join(ways)
        raise ConfigError(problem("worker.no_room", tokens=max_model_len, takes=takes, has=has, how=how, use=use))
    note = (
        f"{pages} pages x {shape.page_tokens} tokens x {shape.token_bytes / 1024:g} KiB = "
        f"{format_bytes(pages * shape.bytes)} ({how})"
    )
    return pages, note


def step_bytes(transformer: Transformer, choices: Choices) -> int:
    """Bytes that the largest step takes on a GPU beside weights and KV, measured: all tokens of the budget, as far as
    all sequences have so many, shared by them; each samples with all filters. Then one draws without, so that kernels
    that are compiled for this vocabulary are so before a request waits for them."""
    shape, device = choices.shape, choices.device
    budget = min(choices.budget, choices.sequences * choices.max_model_len)
    count = min(choices.sequences, budget)
    params = SamplingParams(temperature=1.0, top_p=0.9, top_k=50, min_p=0.01, logprobs=20, prompt_logprobs=20)
    batch, pages = [], -(-budget // count // shape.page_tokens) + 1
    for i in range(count):
        sequence = Sequence(str(i), [0] * (budget // count), params, 0, b"")
        sequence.pages = list(range(i * pages, (i + 1) * pages))
        sequence.slot = 0 if choices.state else None  # all write there: only the bytes matter
        batch.append(Work.next(sequence, budget // count))
    memory = KVMemory(shape, count * pages, device)
    state = StateMemory(choices.state, 1, memory).state if choices.state else None
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    runner = ModelRunner(transformer, memory, frozenset(), state=state)
    runner.launch(batch)()
    taken = torch.cuda.max_memory_allocated(device) - before
    batch[0].sequence.params = SamplingParams()
    runner.launch(batch[:1])()
    del memory, state
    torch.cuda.empty_cache()
    return taken


def swap_pages(config: EngineConfig, shape: PageShape) -> int:
    """Pages that fit the swap space, 0 if there is to be none. Raises `ConfigError` for one that holds nothing."""
    if 0 < config.swap_space < shape.bytes:
        raise ConfigError(problem("worker.swap", given=config.swap_space, page=format_bytes(shape.bytes, up=True)))
    if config.kv_disk and not config.swap_space:
        raise ConfigError(problem("worker.disk_alone"))
    return config.swap_space // shape.bytes if config.enable_prefix_caching else 0
