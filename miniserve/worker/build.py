"""From a configuration to a running engine: the same for a worker process and for `LLM`."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch

from miniserve.config import ConfigError, EngineConfig, format_bytes
from miniserve.kv.host import HostPool
from miniserve.kv.memory import KVMemory, PageShape
from miniserve.kv.pages import PagePool
from miniserve.model.config import ModelConfig
from miniserve.model.transformer import Transformer
from miniserve.model.weights import load_weights
from miniserve.ops import make_ops
from miniserve.ops.cuda_ops import CudaOps
from miniserve.text.grammar import Compiler
from miniserve.text.tokenizer import Tokenizer
from miniserve.worker import sizing
from miniserve.worker.engine import Engine
from miniserve.worker.grammar import Grammars
from miniserve.worker.graphs import DecodeGraphs
from miniserve.worker.pace import Pace
from miniserve.worker.runner import ModelRunner
from miniserve.worker.sequence import Sequence

Progress = Callable[[str, int, int], None]


@dataclass
class Built:
    """An engine and what a person wants to know about it. `layout` names everything that must agree before two pools
    exchange pages; it is also the root of all page hashes."""

    engine: Engine
    grammars: Grammars
    memory: KVMemory
    model: ModelConfig
    layout: str
    dtype: str
    device: str
    kernels: str
    threads: int
    weights_bytes: int
    kv_note: str
    phases: dict[str, float] = field(default_factory=dict)


def build(config: EngineConfig, progress: Progress | None = None) -> Built:
    """Load the model in `config.model` and allocate the KV pool.

    `progress` hears (phase, done, total). Raises `ConfigError` with what to do about it.
    """
    tell = progress or (lambda phase, done, total: None)
    phases: dict[str, float] = {}
    started = time.monotonic()

    def phase(name: str) -> None:
        nonlocal started
        now = time.monotonic()
        phases[name] = now - started
        started = now

    folder = Path(config.model)
    hf_config = json.loads((folder / "config.json").read_text("utf-8"))
    model = ModelConfig.from_hf(hf_config)
    eos = eos_token_ids(folder, hf_config, model.vocab_size)
    # Beside all that follows: reading a large vocabulary takes a second.
    grammars = Grammars(lambda: Compiler(Tokenizer.load(folder), model.vocab_size, eos))
    device = sizing.choose_device(config.device)
    dtype = sizing.choose_dtype(config.dtype, model, device)
    max_model_len = sizing.choose_max_model_len(config.max_model_len, model)
    threads = sizing.prepare_cpu(config) if device.type == "cpu" else 1
    if device.type == "cuda":
        torch.cuda.set_device(device)  # streams, events and kernels belong to the current one
    shape = PageShape(model.layers, config.block_size, model.kv_heads, model.head_dim, dtype)
    num_slots = sizing.swap_pages(config, shape)
    default_budget = sizing.CPU_BATCHED_TOKENS if device.type == "cpu" else sizing.CUDA_BATCHED_TOKENS
    budget = config.max_num_batched_tokens or default_budget
    if device.type == "cpu":
        # Before the weights are read: a model that does not fit should say so at once, not meet the OOM killer.
        estimate = model.num_parameters * dtype.itemsize
        num_pages, kv_note = sizing.size_pool(config, shape, max_model_len, estimate, device)
    ops, kernels = make_ops(
        device,
        dtype,
        model.heads,
        model.head_dim,
        (model.hidden_size, model.intermediate_size),
        config.block_size,
        native=config.cpu_kernels != "torch",
        tell=lambda line: tell(line, 0, 0),
    )
    recorded = ops if isinstance(ops, CudaOps) and not config.enforce_eager else None
    phase("kernels")
    tell("weights", 0, model.layers)
    try:
        weights = load_weights(
            folder,
            model,
            ops,
            dtype,
            device,
            dummy=config.load_format == "dummy",
            progress=lambda done, total: tell("weights", done, total),
        )
        transformer = Transformer(model, weights, ops, max_model_len)
        phase("weights")
        if device.type != "cpu":
            step = sizing.step_bytes(
                transformer, shape, config.max_num_seqs, min(budget, config.max_num_seqs * max_model_len)
            )
            if recorded is not None:
                step += DecodeGraphs.logits_bytes(model.vocab_size, config.max_num_seqs)
            num_pages, kv_note = sizing.size_pool(config, shape, max_model_len, weights.num_bytes, device, step)
            phase("profile")
    except torch.cuda.OutOfMemoryError as error:
        raise ConfigError(
            f"The GPU's memory does not hold the weights and a step of {budget} tokens ({error}). Use a smaller model, "
            "a smaller --max-num-batched-tokens or --max-num-seqs, or another GPU."
        ) from error
    memory = KVMemory(shape, num_pages, device)
    host = HostPool(memory, num_slots, order=config.kv_eviction) if num_slots else None
    if host is not None:
        kv_note += f"; {num_slots} pages = {format_bytes(num_slots * shape.bytes)} of swap space"
    phase("kv")
    graphs = None
    if recorded is not None:
        longest = -(-max_model_len // config.block_size)
        graphs = DecodeGraphs(transformer, recorded, memory.pages, config.max_num_seqs, longest)
    overlap = config.async_scheduling
    drafts = device.type == "cpu" if config.prompt_lookup is None else config.prompt_lookup
    engine = Engine(
        ModelRunner(transformer, memory, eos, device, graphs),
        PagePool(
            num_pages,
            caching=config.enable_prefix_caching,
            order=config.kv_eviction,
            on_evict=host.store if host is not None else None,
        ),
        page_tokens=config.block_size,
        max_num_batched_tokens=budget,
        max_num_seqs=config.max_num_seqs,
        max_model_len=max_model_len,
        host=host,
        grammars=grammars,
        pace=Pace(budget, config.step_stretch) if config.step_stretch else None,
        draft_rows=ops.draft_rows if drafts else 0,
        overlap=device.type == "cuda" if overlap is None else overlap,
    )
    identity = [str(folder.resolve()), hf_config, str(dtype), config.block_size, ops.layout, config.load_format]
    layout = blake2b(json.dumps(identity, sort_keys=True).encode(), digest_size=16).hexdigest()
    return Built(
        engine=engine,
        grammars=grammars,
        memory=memory,
        model=model,
        layout=layout,
        dtype=str(dtype).removeprefix("torch."),
        device=str(device),
        kernels=kernels,
        threads=threads,
        weights_bytes=weights.num_bytes,
        kv_note=kv_note,
        phases=phases,
    )


def warm_up(engine: Engine, root: bytes) -> None:
    """Run a prompt and a few tokens, so that the first user does not pay for lazy initialisation; leaves no trace."""
    from miniserve.sampling_params import SamplingParams

    length = min(64, engine.max_model_len // 2)
    params = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True)
    engine.add(Sequence("warm-up", [1] * length, params, 0, root))
    while engine.has_work or engine.find("warm-up"):
        engine.admit()
        engine.step()
    engine.reset()


def eos_token_ids(folder: Path, config: dict[str, Any], vocab_size: int) -> frozenset[int]:
    """The tokens that end a turn: those of config.json and of generation_config.json, single or a list.

    Some models name one that they have no row for; it can never be sampled.
    """
    try:
        generation = json.loads((folder / "generation_config.json").read_text("utf-8"))
    except FileNotFoundError:
        generation = {}
    except ValueError as error:
        raise ConfigError(f"{folder}/generation_config.json cannot be read: {error}.") from error
    found: set[int] = set()
    for source in (config, generation):
        ids = source.get("eos_token_id")
        found |= {ids} if isinstance(ids, int) else set(ids or ())
    return frozenset(token for token in found if 0 <= token < vocab_size)
