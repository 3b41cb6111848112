"""How fast the engine is, with random weights in the shapes of real models, as shares of ceilings."""

from __future__ import annotations

import time
from typing import Any

from miniserve.model.config import ModelConfig
from miniserve.worker.build import Built
from miniserve.worker.engine import Engine
from scripts.gpu import ceilings, trace
from scripts.gpu.common import abort, add, drain, greedy, random_prompts, shaped
from scripts.gpu.setting import Figure, Figures, Setting

ROOFLINE = {1: 0.85, 256: 0.70}
"""The least share of the bandwidth roofline that decoding at a batch size must reach with Llama-3-8B."""
MATMUL = {8192: 0.60}
"""The same for prefill, of the measured matmul rate."""
APPEND = 1.5
"""An append of 67 tokens over 16k cached ones takes less than this many times one decode step's bytes."""
APPENDED = 67
HOST = 0.03
"""The most of a step's time that may be lost to the host at batch 64."""
LLAMA = "llama-3-8b"
SIZES = (256, 64, 16, 1)
"""Of batches, largest first: the others are what is left of it."""
LENGTHS = (512, 2048, 8192, 16384)


def weight_bytes(model: ModelConfig) -> int:
    """What a decode step reads of bf16 weights: of an embedding that is not also the head only a few rows."""
    rows = 0 if model.tie_embeddings else model.vocab_size * model.hidden_size
    return (model.num_parameters - rows) * 2


def read_bytes(model: ModelConfig, context: float) -> float:
    """The same with the KV of so many tokens."""
    return weight_bytes(model) + context * model.kv_layers * 2 * model.kv_heads * model.head_dim * 2


def operations(model: ModelConfig, length: int) -> float:
    """Of a prefill: 2 for each weight of the layers and token, 4 for each number of each head and pair of tokens, half
    of which are masked, and the last token's logits."""
    ends = model.vocab_size * model.hidden_size
    layers = model.num_parameters - ends * (1 if model.tie_embeddings else 2)
    pairs = length * length / 2
    return 2 * layers * length + 4 * model.kv_layers * model.heads * model.head_dim * pairs + 2 * ends


def engine_for(run: Setting, preset: str, layers: int = 0, **engine: Any) -> Built:
    """The engine that decode, prefill and append are measured with; with so many `layers`, or all."""
    # Pinned down so that the same build serves several checks: 256 sequences of 1,024 tokens and what they grow to.
    built = shaped(run, preset, layers, max_model_len=1024 if run.small else 20480, **engine)
    abort(built.engine, [s.turn for s in (*built.engine.waiting, *built.engine.running)])  # of a check that failed
    drain(built.engine)
    built.engine.reset()
    return built


# --- decode ---------------------------------------------------------------------------------------------------------


def prefilled(run: Setting, built: Built, count: int) -> list[str]:
    """Queue `count` sequences with contexts of 1k tokens of their own and step until all decode."""
    engine, length = built.engine, 64 if run.small else 1024
    turns = [f"decode {i}" for i in range(count)]
    for turn, prompt in zip(turns, random_prompts(count, length, built.model.vocab_size, seed=1), strict=True):
        add(engine, turn, prompt, greedy(4096 if not run.small else 900))
    waiting = set(turns)
    while waiting:
        engine.admit()
        waiting -= {output.turn for output in engine.step().outputs}
    return turns


def step_seconds(run: Setting, engine: Engine, steps: int) -> float:
    """Seconds from one step's tokens to the next one's, over `steps` of them: the median of three windows."""
    found = []
    for _ in range(3):
        tokens_of_a_step(engine)
        begun = time.perf_counter()
        for _ in range(steps):
            tokens_of_a_step(engine)
        found.append((time.perf_counter() - begun) / steps)
    return sorted(found)[1]


def tokens_held(engine: Engine) -> int:
    """Tokens of all sequences that run: a decode step reads the KV of them."""
    return sum(len(sequence.tokens) for sequence in engine.running)


def tokens_of_a_step(engine: Engine) -> None:
    """Step until tokens come: with overlap a step may bring those of the one before, or none."""
    while not engine.step().outputs:
        pass


def decode(run: Setting, preset: str, eager: bool = False, layers: int = 0, sizes: tuple[int, ...] = SIZES) -> Figures:
    """A step at each batch size over 1k context, as a share of reading weights and KV at the measured bandwidth."""
    built = engine_for(run, preset, layers, enforce_eager=eager)
    engine, bandwidth = built.engine, ceilings.measured(run).bandwidth
    sizes = toy(run, sizes, 8)
    turns = prefilled(run, built, sizes[0])
    for size in sizes:
        abort(engine, turns[size:])
        turns = turns[:size]
        for _ in range(4):  # what is in flight, and the graph of this size
            tokens_of_a_step(engine)
        before = tokens_held(engine)
        taken = step_seconds(run, engine, 4 if run.small else 24)
        context = (before + tokens_held(engine)) / 2
        share = read_bytes(built.model, context) / taken / bandwidth
        limit = ROOFLINE.get(size) if preset == LLAMA and not eager and not layers else None
        yield Figure(f"batch {size}: step", taken * 1e3, "ms")
        yield Figure(f"batch {size}: output", size / taken, "tokens/s")
        rule = ">=" if limit else ""
        yield Figure(f"batch {size}: share of the bandwidth roofline", share, "", rule, limit or 0.0)
        run.kept[f"decode {preset} {eager} {layers} {size}"] = taken, context
    abort(engine, turns)
    drain(engine)


def toy(run: Setting, sizes: tuple[int, ...], largest: int) -> tuple[int, ...]:
    """`sizes`, or at toy size as many others: `largest`, its half and so on."""
    return tuple(largest >> i for i in range(len(sizes))) if run.small else sizes


def graphs(run: Setting, preset: str) -> Figures:
    """How many times faster steps are as CUDA graphs."""
    for eager in (False, True):
        if f"decode {preset} {eager} 0 1" not in run.kept:
            yield from (
                Figure(f"{f.name}, {'eager' if eager else 'graphs'}", f.value, f.unit)
                for f in decode(run, preset, eager)
            )
    for size in toy(run, SIZES, 8):
        with_graphs, without = (run.kept[f"decode {preset} {eager} 0 {size}"][0] for eager in (False, True))
        yield Figure(f"batch {size}: eager steps take", without / with_graphs, "times as long")


# --- prefill --------------------------------------------------------------------------------------------------------


def first_token(engine: Engine, turn: str, prompt: list[int]) -> tuple[float, int]:
    """Seconds from a turn's arrival to its first token, and how many of its tokens were cached."""
    begun = time.perf_counter()
    add(engine, turn, prompt, greedy(1))
    while True:
        engine.admit()
        if outputs := engine.step().outputs:
            taken = time.perf_counter() - begun
            drain(engine)
            return taken, outputs[0].cached_tokens or 0


def prefill(run: Setting, preset: str, layers: int = 0, lengths: tuple[int, ...] = LENGTHS) -> Figures:
    """Prompts of several lengths alone, as a share of the matmul rate."""
    built = engine_for(run, preset, layers)
    engine, model, rate = built.engine, built.model, ceilings.measured(run).matmul
    for length in toy(run, lengths, 512):
        times = []
        for repeat in range(4):
            prompt = random_prompts(1, length, model.vocab_size, seed=1000 * length + repeat)[0]
            times.append(first_token(engine, f"prefill {length} {repeat}", prompt)[0])
        taken = sorted(times[1:])[1]
        limit = MATMUL.get(length) if preset == LLAMA and not layers else None
        yield Figure(f"{length} tokens", taken * 1e3, "ms")
        yield Figure(f"{length} tokens: rate", length / taken, "tokens/s")
        share = operations(model, length) / taken / rate
        yield Figure(f"{length} tokens: share of the matmul rate", share, "", ">=" if limit else "", limit or 0.0)
        run.kept[f"prefill {preset} {layers} {length}"] = taken


def append(run: Setting, preset: str, layers: int = 0) -> Figures:
    """67 new tokens over 16k that are cached, from arrival to first token, against the time that a decode step's bytes
    take at the measured bandwidth."""
    built = engine_for(run, preset, layers)
    engine, length = built.engine, history_length(run)
    vocab = built.model.vocab_size
    history = random_prompts(1, length, vocab, seed=7)[0]
    first_token(engine, "history", [*history, 1])
    times = []
    for repeat in range(9):
        prompt = history + random_prompts(1, APPENDED, vocab, seed=100 + repeat)[0]
        taken, cached = first_token(engine, f"append {repeat}", prompt)
        if cached != length:
            raise RuntimeError(f"{cached} of {length} tokens were cached")
        times.append(taken)
    taken = sorted(times[1:])[4]
    alone = read_bytes(built.model, length + APPENDED) / ceilings.measured(run).bandwidth
    add(engine, "step", history + random_prompts(1, APPENDED, vocab, seed=99)[0], greedy(1))
    engine.admit()  # without this, hashing the prompt and finding its pages
    begun = time.perf_counter()
    tokens_of_a_step(engine)
    step = time.perf_counter() - begun
    drain(engine)
    yield Figure("arrival to first token", taken * 1e3, "ms")
    yield Figure("of which without admission (one measurement)", step * 1e3, "ms")
    yield Figure("a decode step's bytes at measured bandwidth", alone * 1e3, "ms")
    rule = "<=" if preset == LLAMA and not layers else ""
    yield Figure("times as long", taken / alone, "", rule, APPEND if rule else 0.0)
    run.kept[f"append {preset} {layers}"] = taken


def history_length(run: Setting) -> int:
    """Tokens that are cached when others are appended."""
    return 256 if run.small else 16384


# --- the host -------------------------------------------------------------------------------------------------------


def host(run: Setting, preset: str) -> Figures:
    """The share of a step in which the device has nothing to do, at batch 64.

    The device is at work from the first to the last kernel of each launch, a graph's or a single one's: what lies
    between launches is the host's fault.
    """
    built = engine_for(run, preset)
    engine, steps = built.engine, 4 if run.small else 24
    turns = prefilled(run, built, 4 if run.small else 64)
    for _ in range(8):
        tokens_of_a_step(engine)
    plain = step_seconds(run, engine, steps)
    yield Figure("step", plain * 1e3, "ms")
    if run.cuda:
        with trace.profiled(run) as profiler:
            for _ in range(steps):
                tokens_of_a_step(engine)
        busy, whole = trace.at_work(profiler)
        yield Figure("step while it is profiled", whole / steps * 1e3, "ms")
        yield Figure("device at work in a step", busy / steps * 1e3, "ms")
        yield Figure("lost to the host", 1 - busy / whole, "of the device's time", "<=", HOST)
    else:
        yield Figure("lost to the host", "needs a GPU")
    abort(engine, turns)
    drain(engine)
