"""A first look at speed in half a minute: a few layers of Llama-3-8B, what all 32 of them would take, and which kernels
take it. Nothing is judged here."""

from __future__ import annotations

from collections.abc import Callable

from miniserve.model.config import ModelConfig
from scripts.gpu import ceilings, speed, trace
from scripts.gpu.capture import LAYERS
from scripts.gpu.common import abort, add, drain, greedy, model_folder, random_prompts, read_json
from scripts.gpu.setting import Figure, Figures, Setting
from scripts.gpu.speed import LLAMA

SIZES = (256, 64, 1)
LENGTHS = (8192,)
FEWER = 2
"""Layers of a second engine: the difference is what a layer takes."""
KERNELS = 10
"""So many of those that take longest are named."""


def decode(run: Setting) -> Figures:
    """Steps at three batch sizes."""
    yield from speed.decode(run, LLAMA, layers=LAYERS, sizes=SIZES)


def prefill(run: Setting) -> Figures:
    """A prompt of 8k tokens."""
    yield from speed.prefill(run, LLAMA, layers=LAYERS, lengths=LENGTHS)


def append(run: Setting) -> Figures:
    """67 tokens over 16k cached ones."""
    yield from speed.append(run, LLAMA, layers=LAYERS)


def prediction(run: Setting) -> Figures:
    """The same with fewer layers, and from both what the whole model would take, beside the limit that it has. Of more
    layers only what the checks before have measured, if this process ran any: the others have failed."""
    measured = any(f"{LLAMA} {LAYERS}" in name or f"{LLAMA} False {LAYERS}" in name for name in run.kept)
    for layers in (FEWER,) if measured else (LAYERS, FEWER):
        for figures in (
            speed.decode(run, LLAMA, False, layers, SIZES),
            speed.prefill(run, LLAMA, layers, LENGTHS),
            speed.append(run, LLAMA, layers),
        ):
            for _ in figures:
                pass
    model = ModelConfig.from_hf(read_json(model_folder(run, LLAMA) / "config.json"))
    roof = ceilings.measured(run)
    for size in speed.toy(run, SIZES, 8):
        if (with_more := run.kept.get(f"decode {LLAMA} False {LAYERS} {size}")) is None:
            continue
        more, context = with_more
        fewer, _ = run.kept[f"decode {LLAMA} False {FEWER} {size}"]
        taken = whole(more, fewer, len(model.layers))
        yield Figure(f"batch {size}: a layer", (more - fewer) / (LAYERS - FEWER) * 1e6, "us")
        yield Figure(f"batch {size}: a step of all layers", taken * 1e3, "ms")
        share, limit = speed.read_bytes(model, context) / taken / roof.bandwidth, speed.ROOFLINE.get(size)
        yield Figure(f"batch {size}: share of the bandwidth roofline", share, said(limit))
    for length in speed.toy(run, LENGTHS, 512):
        if (more := run.kept.get(f"prefill {LLAMA} {LAYERS} {length}")) is not None:
            taken = whole(more, run.kept[f"prefill {LLAMA} {FEWER} {length}"], len(model.layers))
            share = speed.operations(model, length) / taken / roof.matmul
            yield Figure(f"{length} tokens: share of the matmul rate", share, said(speed.MATMUL.get(length)))
    if (more := run.kept.get(f"append {LLAMA} {LAYERS}")) is not None:
        taken = whole(more, run.kept[f"append {LLAMA} {FEWER}"], len(model.layers))
        alone = speed.read_bytes(model, speed.history_length(run) + speed.APPENDED) / roof.bandwidth
        yield Figure("append: arrival to first token", taken * 1e3, "ms")
        yield Figure("append: times a decode step's bytes", taken / alone, said(speed.APPEND))


def whole(more: float, fewer: float, layers: int) -> float:
    """Seconds that so many layers take, from those of `LAYERS` and of `FEWER`."""
    return more + (layers - LAYERS) * (more - fewer) / (LAYERS - FEWER)


def said(limit: float | None) -> str:
    """What the speed stage will judge."""
    return f"(limit {limit:g})" if limit else ""


def kernels(run: Setting) -> Figures:
    """What the device's time goes to: a decode step of 64, a prompt of 8k, an append."""
    if not run.cuda:
        yield Figure("not run", "needs a GPU")
        return
    built = speed.engine_for(run, LLAMA, LAYERS)
    engine, vocab, steps = built.engine, built.model.vocab_size, 8
    turns = speed.prefilled(run, built, 64)
    for _ in range(4):
        speed.tokens_of_a_step(engine)
    yield from _kernels(run, "decode of 64", lambda: [speed.tokens_of_a_step(engine) for _ in range(steps)], steps)
    abort(engine, turns)
    drain(engine)
    prompt = random_prompts(1, LENGTHS[0], vocab, seed=11)[0]
    yield from _kernels(run, f"prefill of {len(prompt)}", lambda: speed.first_token(engine, "kernels", prompt), 1)
    history = random_prompts(1, speed.history_length(run), vocab, seed=7)[0]
    speed.first_token(engine, "history", [*history, 1])
    add(engine, "append", history + random_prompts(1, speed.APPENDED, vocab, seed=12)[0], greedy(1))
    yield from _kernels(run, f"append of {speed.APPENDED}", lambda: drain(engine), 1)


def _kernels(run: Setting, what: str, work: Callable[[], object], steps: int) -> Figures:
    """What `work`, of so many steps, launched. A profiler that gives nothing is no fault of the engine."""
    with trace.profiled(run) as profiler:
        work()
    try:
        spent, (busy, span) = trace.by_kernel(profiler), trace.at_work(profiler)
    except RuntimeError as error:
        yield Figure(f"{what}: time by kernel", f"not known: {error}")
        return
    yield Figure(f"{what}: device at work", busy / steps * 1e6, "us a step")
    yield Figure(f"{what}: from its first to its last kernel", span / steps * 1e6, "us a step")
    yield Figure(f"{what}: kernels", sum(calls for _, calls in spent.values()) / steps, "a step")
    for name, (seconds, calls) in list(spent.items())[:KERNELS]:
        yield Figure(f"{what}: {name}", seconds / steps * 1e6, f"us a step, {calls / steps:g} calls")
