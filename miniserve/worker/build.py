"""From a configuration to a running engine: the same for a worker process and for `LLM`."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from hashlib import blake2b
from pathlib import Path

import torch

from miniserve.cluster.launch import WorkerSpec
from miniserve.cluster.messages import Facts
from miniserve.cluster.rank_messages import RankCommand
from miniserve.config import ConfigError, EngineConfig, format_bytes, problem
from miniserve.kv.disk import Disk
from miniserve.kv.eviction import make_order
from miniserve.kv.files import Folder
from miniserve.kv.host import HostPool
from miniserve.kv.memory import KVMemory
from miniserve.kv.pages import PagePool
from miniserve.kv.states import StateMemory
from miniserve.kv.swap import SwapSpace
from miniserve.model.config import ModelConfig
from miniserve.model.transformer import Transformer
from miniserve.model.weights import load_weights
from miniserve.ops import DRAFT_ROWS, make_ops
from miniserve.ops.group import Group, make_group
from miniserve.sampling_params import ParameterError, SamplingParams
from miniserve.text.grammar import Compiler
from miniserve.text.tokenizer import Tokenizer
from miniserve.worker import sizing
from miniserve.worker.batching import Pace
from miniserve.worker.engine import Engine
from miniserve.worker.grammar import Grammars
from miniserve.worker.graphs import LADDER, SEQUENCES, GraphOps, StepGraphs
from miniserve.worker.runner import ModelRunner
from miniserve.worker.sequence import Sequence
from miniserve.worker.snapshots import Snapshots

Progress = Callable[[str, int, int], None]
SIZES = {"int8": (8.5, 8.5), "int4": (4.5, 8.5)}
"""Bits that a number takes in the layers' matrices and in the head, with its share of a scale."""


@dataclass
class Built:
    """An engine and its parts. `layout` names everything that must agree before two pools
    exchange pages; it is also the root of all page hashes."""

    engine: Engine
    runner: ModelRunner
    grammars: Grammars
    memory: KVMemory
    model: ModelConfig
    layout: str
    facts: Facts


def build(
    config: EngineConfig,
    progress: Progress = lambda phase, done, total: None,
    spec: WorkerSpec | None = None,
    tell: Callable[[RankCommand], None] = lambda command: None,
) -> Built:
    """Load the model in `config.model` and allocate the KV pool. `progress` is called with (phase, done, total). Each
    rank of several, which `spec` is of, builds the same at the same time; the engine of rank 0 is that of the worker,
    and the others are to `tell` of what it does. Raises `ConfigError` with what to do about it."""
    phases: dict[str, float] = {}
    began = time.monotonic()

    def lap(phase: str) -> None:
        phases[phase] = time.monotonic() - began - sum(phases.values())

    choices = sizing.Choices.of(config, spec.rank if spec else 0)
    model, device = choices.shard.config, choices.device
    # Beside all that follows: reading a large vocabulary takes a second.
    tokenizer = ThreadPoolExecutor(1, "tokenizer").submit(Tokenizer.load, Path(config.model))
    grammars = Grammars(lambda: Compiler(tokenizer.result(), model.vocab_size))
    threads = 1
    if device.type == "cuda":
        torch.cuda.set_device(device)  # streams, events and kernels belong to the current one
    else:
        threads = sizing.prepare_cpu(config)
        # Before the weights are read: a model that does not fit should say so at once, not meet the OOM killer.
        bits = SIZES.get(config.quantization or "", choices.files.bits)
        estimate = sizing.weight_bytes(model, choices.dtype, *(bits if config.cpu_kernels == "auto" else (None, None)))
        size = sizing.size_pool(config, choices, estimate)
    of = device, choices.dtype, model.sizes, config.block_size
    ops, kernels = make_ops(*of, native=config.cpu_kernels != "torch", progress=lambda line: progress(line, 0, 0))
    group = make_group(device, spec, config.tensor_parallel_size)
    choices = replace(choices, sequences=_least(group, choices.sequences, device))
    if device.type == "cuda" and kernels != "flashinfer":
        config.fall_back(kernels)
    graph_ops = ops if isinstance(ops, GraphOps) and not config.enforce_eager else None
    if graph_ops is not None and model.experts is not None and not graph_ops.records_mixtures:
        kernels = config.fall_back(f"{kernels}, without CUDA graphs: torch has no products of experts for them here")
        graph_ops = None
    sizes = sorted({min(size, choices.sequences) for size in config.cuda_graph_sizes or LADDER})
    lap("kernels")
    try:
        shown = partial(progress, "weights")
        shown(0, len(model.layers))
        given = choices.files.weights, choices.shard, ops, choices.dtype, device
        packing = choices.files.config.get("quantization_config") or {}
        weights = load_weights(*given, packing=packing, quantization=config.quantization, progress=shown)
        transformer = Transformer(model, weights, ops, choices.max_model_len, group)
        lap("weights")
        if device.type == "cuda":
            step = sizing.step_bytes(transformer, choices)
            if graph_ops is not None:
                step += 4 * model.vocab_size * sizes[-1]  # the logits of all graphs
            size = sizing.size_pool(config, choices, weights.num_bytes, step)
            lap("profile")
    except torch.cuda.OutOfMemoryError as error:
        raise ConfigError(problem("worker.out_of_memory", tokens=choices.budget, error=error)) from error
    layout = choices.layout(config, ops)
    num_pages, kv_note = _least(group, size[0], device), size[1]
    if group.ranks > 1:
        kv_note += f"; {num_pages} pages on each of {group.ranks} ranks"
    memory = KVMemory(choices.shape, num_pages, device, choices.snapshot)
    host = disk = None
    if choices.swap_pages:
        swap = SwapSpace(memory, choices.swap_pages, tell=tell)
        host = HostPool(swap, make_order(config.kv_eviction))
        kv_note += f"; {host.num_pages} pages = {format_bytes(host.num_pages * choices.shape.bytes)} of swap space"
    order, on_evict = make_order(config.kv_eviction), None if host is None else host.store
    pool = PagePool(num_pages, order, caching=config.enable_prefix_caching, on_evict=on_evict)
    if config.kv_disk and host is not None:
        if group.ranks > 1 or choices.state:
            kv_note += "; none on disk, which is for workers of one device and models without recurrent state"
        else:
            disk = Disk(_folder(Path(config.kv_disk), config, choices, layout, swap), host, pool)
            kv_note += f"; at most {format_bytes(config.kv_disk_size)} on disk"
    if choices.state:
        kv_note += (
            f"; a snapshot of recurrent state takes {choices.snapshot} pages = "
            f"{format_bytes(choices.snapshot * choices.shape.bytes)}, as does each of {choices.sequences} slots"
        )
    lap("kv")
    longest = -(-choices.max_model_len // config.block_size)
    states = StateMemory(choices.state, choices.sequences, memory, tell) if choices.state else None
    state = states.state if states else None
    graphs = None
    if graph_ops is not None:
        try:
            appending = 0 if config.cuda_graph_sizes or state else min(SEQUENCES, sizes[-1])
            graphs = StepGraphs(transformer, graph_ops, memory.pages, state, sizes, appending, longest)
        except Exception as error:  # of torch or CUDA
            if group.ranks > 1:  # the others may wait for this one in a product
                raise
            cause = (str(error.__context__ or error) or repr(error)).splitlines()[0].split(". ")[0]
            kernels = config.fall_back(f"{kernels}, without CUDA graphs: {cause}")
        lap("graphs")
    try:  # some models name an end token that they have no row for; it can never be sampled
        eos = frozenset(token for token in tokenizer.result().eos_token_ids if token < model.vocab_size)
    except ParameterError as error:
        raise ConfigError(error.message) from error
    runner = ModelRunner(transformer, memory, eos, graphs, state, tell)
    engine = Engine(
        runner,
        pool,
        page_tokens=config.block_size,
        max_num_batched_tokens=choices.budget,
        max_num_seqs=choices.sequences,
        max_model_len=choices.max_model_len,
        host=host,
        disk=disk,
        snapshots=Snapshots(states, pool, host, config.block_size) if states else None,
        grammars=grammars,
        pace=Pace(choices.budget, config.step_stretch) if config.step_stretch else None,
        overlap=choices.overlap,
        draft_rows=DRAFT_ROWS if choices.drafts else 0,
    )
    facts = Facts(
        dtype=str(choices.dtype).removeprefix("torch."),
        device=str(device),
        kernels=kernels,
        threads=threads,
        weights_bytes=weights.num_bytes,
        page_tokens=config.block_size,
        max_model_len=choices.max_model_len,
        vocab_size=model.vocab_size,
        phases=phases,
        kv_note=kv_note,
    )
    return Built(engine, runner, grammars, memory, model, layout, facts)


def _folder(path: Path, config: EngineConfig, choices: sizing.Choices, layout: str, swap: SwapSpace) -> Folder:
    """Where KV lies on disk: a folder for each layout and set of weights. Raises `ConfigError`."""
    weights = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in choices.files.weights]
    name = blake2b(repr((layout, weights)).encode(), digest_size=8).hexdigest()
    memory = swap.pages.view(torch.uint8).view(swap.num_pages, -1).numpy()
    try:
        return Folder(path.expanduser() / name, config.kv_disk_size, memory)
    except OSError as error:
        raise ConfigError(problem("worker.disk", folder=path, error=error)) from error


def _least(group: Group, number: int, device: torch.device) -> int:
    """The smallest of what all ranks have."""
    numbers = torch.tensor([float(number * (rank == group.rank)) for rank in range(group.ranks)], device=device)
    return int(min(group.sum(numbers).tolist()))


def warm_up(engine: Engine, root: bytes) -> None:
    """Run a prompt and a few tokens, so that the first user does not pay for lazy initialisation; leaves no trace."""
    length = min(64, engine.max_model_len // 2)
    params = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True)
    engine.add(Sequence("warm-up", [1] * length, params, 0, root))
    while engine.has_work or engine.find("warm-up"):
        engine.admit()
        engine.step()
    engine.reset()
