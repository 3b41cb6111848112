"""How fast the engine is, with random weights in the shapes of real models, as shares of ceilings."""

from __future__ import annotations

import random
import time
from typing import Any

import torch

from miniserve.llm import LLM
from miniserve.sampling_params import SamplingParams
from miniserve.worker.build import Built
from miniserve.worker.engine import Engine
from scripts.gpu import ceilings
from scripts.gpu.common import (
    Figure,
    Figures,
    Setting,
    abort,
    add,
    drain,
    drop_engine,
    greedy,
    model_folder,
    random_prompts,
    shaped,
)

ROOFLINE = {1: 0.85, 256: 0.70}
"""The least share of the bandwidth roofline that decoding at a batch size must reach with Llama-3-8B."""
MATMUL = {8192: 0.60}
"""The same for prefill, of the measured matmul rate."""
APPEND = 1.5
"""An append of 67 tokens over 16k cached ones takes less than this many times one decode step's bytes."""
HOST = 0.03
"""The most of a step's time that may be lost to the host at batch 64."""
TIMES_TRANSFORMERS = 5.0
"""How many times faster than transformers' continuous batching the 256-sequence benchmark must be."""
LLAMA = "llama-3-8b"


def batch_sizes(run: Setting) -> tuple[int, ...]:
    """Largest first: the others are what is left of it."""
    return (8, 4, 2, 1) if run.small else (256, 64, 16, 1)


def weight_bytes(built: Built) -> int:
    """What a decode step reads of the weights: of an embedding that is not also the head only a few rows."""
    model = built.model
    rows = 0 if model.tie_embeddings else model.vocab_size * model.hidden_size
    return (model.num_parameters - rows) * built.memory.shape.dtype.itemsize


def engine_for(run: Setting, preset: str, **engine: Any) -> Built:
    """The engine that decode, prefill and append are measured with."""
    # Pinned down so that the same build serves several checks: 256 sequences of 1,024 tokens and what they grow to.
    built = shaped(run, preset, max_model_len=1024 if run.small else 20480, **engine)
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
        _tokens_of_a_step(engine)
        begun = time.perf_counter()
        for _ in range(steps):
            _tokens_of_a_step(engine)
        found.append((time.perf_counter() - begun) / steps)
    return sorted(found)[1]


def tokens_held(engine: Engine) -> int:
    """Tokens of all sequences that run: a decode step reads the KV of them."""
    return sum(len(sequence.tokens) for sequence in engine.running)


def _tokens_of_a_step(engine: Engine) -> None:
    """Step until tokens come: with overlap a step may bring those of the one before, or none."""
    while not engine.step().outputs:
        pass


def decode(run: Setting, preset: str, eager: bool = False) -> Figures:
    """A step at each batch size over 1k context, as a share of reading weights and KV at the measured bandwidth."""
    built = engine_for(run, preset, enforce_eager=eager)
    engine, bandwidth = built.engine, ceilings.measured(run).bandwidth
    turns = prefilled(run, built, batch_sizes(run)[0])
    for size in batch_sizes(run):
        abort(engine, turns[size:])
        turns = turns[:size]
        for _ in range(4):  # what is in flight, and the graph of this size
            _tokens_of_a_step(engine)
        before = tokens_held(engine)
        taken = step_seconds(run, engine, 4 if run.small else 24)
        context = (before + tokens_held(engine)) / 2
        read = weight_bytes(built) + context * built.memory.shape.token_bytes
        share = read / taken / bandwidth
        limit = ROOFLINE.get(size) if preset == LLAMA and not eager else None
        yield Figure(f"batch {size}: step", taken * 1e3, "ms")
        yield Figure(f"batch {size}: output", size / taken, "tokens/s")
        rule = ">=" if limit else ""
        yield Figure(f"batch {size}: share of the bandwidth roofline", share, "", rule, limit or 0.0)
        run.kept[f"decode {preset} {eager} {size}"] = taken
    abort(engine, turns)
    drain(engine)


def graphs(run: Setting, preset: str) -> Figures:
    """How many times faster steps are as CUDA graphs."""
    for eager in (False, True):
        if f"decode {preset} {eager} 1" not in run.kept:
            yield from (
                Figure(f"{f.name}, {'eager' if eager else 'graphs'}", f.value, f.unit)
                for f in decode(run, preset, eager)
            )
    for size in batch_sizes(run):
        with_graphs, without = (run.kept[f"decode {preset} {eager} {size}"] for eager in (False, True))
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


def prefill(run: Setting, preset: str) -> Figures:
    """Prompts of several lengths alone, as a share of the matmul rate: their operations are 2 for each weight of the
    layers and token, and 4 for each number of each head and pair of tokens, half of which are masked."""
    built = engine_for(run, preset)
    engine, model, rate = built.engine, built.model, ceilings.measured(run).matmul
    ends = model.vocab_size * model.hidden_size
    layers = model.num_parameters - ends * (1 if model.tie_embeddings else 2)
    for length in (32, 64) if run.small else (512, 2048, 8192, 16384):
        times = []
        for repeat in range(4):
            prompt = random_prompts(1, length, model.vocab_size, seed=1000 * length + repeat)[0]
            times.append(first_token(engine, f"prefill {length} {repeat}", prompt)[0])
        taken = sorted(times[1:])[1]
        pairs = length * length / 2
        operations = 2 * layers * length + 4 * model.kv_layers * model.heads * model.head_dim * pairs + 2 * ends
        limit = MATMUL.get(length) if preset == LLAMA else None
        yield Figure(f"{length} tokens", taken * 1e3, "ms")
        yield Figure(f"{length} tokens: rate", length / taken, "tokens/s")
        share = operations / taken / rate
        yield Figure(f"{length} tokens: share of the matmul rate", share, "", ">=" if limit else "", limit or 0.0)


def append(run: Setting, preset: str) -> Figures:
    """67 new tokens over 16k that are cached, from arrival to first token, against the time that a decode step's bytes
    take at the measured bandwidth."""
    built = engine_for(run, preset)
    engine, length, new = built.engine, 256 if run.small else 16384, 67
    vocab = built.model.vocab_size
    history = random_prompts(1, length, vocab, seed=7)[0]
    first_token(engine, "history", [*history, 1])
    times = []
    for repeat in range(9):
        prompt = history + random_prompts(1, new, vocab, seed=100 + repeat)[0]
        taken, cached = first_token(engine, f"append {repeat}", prompt)
        if cached != length:
            raise RuntimeError(f"{cached} of {length} tokens were cached")
        times.append(taken)
    taken = sorted(times[1:])[4]
    read = weight_bytes(built) + (length + new) * built.memory.shape.token_bytes
    alone = read / ceilings.measured(run).bandwidth
    add(engine, "step", history + random_prompts(1, new, vocab, seed=99)[0], greedy(1))
    engine.admit()  # without this, hashing the prompt and finding its pages
    begun = time.perf_counter()
    while not engine.step().outputs:
        pass
    step = time.perf_counter() - begun
    drain(engine)
    yield Figure("arrival to first token", taken * 1e3, "ms")
    yield Figure("of which without admission (one measurement)", step * 1e3, "ms")
    yield Figure("a decode step's bytes at measured bandwidth", alone * 1e3, "ms")
    rule = "<=" if preset == LLAMA else ""
    yield Figure("times as long", taken / alone, "", rule, APPEND if rule else 0.0)


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
        _tokens_of_a_step(engine)
    plain = step_seconds(run, engine, steps)
    yield Figure("step", plain * 1e3, "ms")
    if run.cuda:
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            for _ in range(steps):
                _tokens_of_a_step(engine)
            run.sync()
        busy, whole = at_work(profiler)
        yield Figure("step while it is profiled", whole / steps * 1e3, "ms")
        yield Figure("device at work in a step", busy / steps * 1e3, "ms")
        yield Figure("lost to the host", 1 - busy / whole, "of the device's time", "<=", HOST)
    else:
        yield Figure("lost to the host", "needs a GPU")
    abort(engine, turns)
    drain(engine)


def at_work(profiler: Any) -> tuple[float, float]:
    """Seconds that a device was at work, and from its first to its last kernel."""
    launches: dict[int, list[int]] = {}
    for event in profiler.profiler.kineto_results.events():
        if event.device_type() == torch.autograd.DeviceType.CUDA and event.duration_ns() > 0:
            begin, end = event.start_ns(), event.start_ns() + event.duration_ns()
            span = launches.setdefault(event.correlation_id(), [begin, end])
            span[:] = min(span[0], begin), max(span[1], end)
    if not launches:
        raise RuntimeError("the profiler saw no kernel")
    busy, until = 0, 0
    for begin, end in sorted(launches.values()):
        busy += max(0, end - max(begin, until))
        until = max(until, end)
    return busy / 1e9, (until - min(begin for begin, _ in launches.values())) / 1e9


# --- the benchmark of 256 sequences ---------------------------------------------------------------------------------


def benchmark_requests(run: Setting) -> tuple[list[list[int]], list[int]]:
    """nano-vllm's bench.py: prompts and lengths of outputs, 100 to 1,024 tokens each, ids below 10,000."""
    pick = random.Random(0)
    count, low, high, ids = (8, 10, 32, 1000) if run.small else (256, 100, 1024, 10000)
    prompts = [[pick.randint(0, ids) for _ in range(pick.randint(low, high))] for _ in range(count)]
    return prompts, [pick.randint(low, high) for _ in range(count)]


def benchmark(run: Setting) -> Figures:
    """256 sequences at once, drawn at temperature 0.6 as there; output tokens a second, Qwen3-0.6B's shape."""
    drop_engine(run)
    settings: dict[str, Any] = {"load_format": "dummy", "device": run.device, "max_model_len": 4096}
    settings |= {"kv_cache_memory": 2**26, "threads": 1} if run.small else {"dtype": "bfloat16"}
    llm = LLM(model_folder(run, "qwen3-0.6b"), **settings)
    prompts, lengths = benchmark_requests(run)

    def generate(items: list[list[int]], outputs: list[int]) -> float:
        params = [SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=n, seed=i) for i, n in enumerate(outputs)]
        begun = time.perf_counter()
        answers = llm.generate(items, params, progress=False)
        taken = time.perf_counter() - begun
        if [len(answer.outputs[0].token_ids) for answer in answers] != outputs:
            raise RuntimeError("an answer has another length than asked for")
        return taken

    # Other prompts of as many sequences first, which end one after the other: graphs of all sizes are captured.
    warm = generate([[token + 1 for token in p[:32]] for p in prompts], [2 + i // 4 for i in range(len(prompts))])
    yield Figure("warm-up", warm, "s")
    taken = generate(prompts, lengths)
    rate = sum(lengths) / taken
    run.kept["benchmark"] = rate
    yield Figure("output tokens", sum(lengths))
    yield Figure("time", taken, "s")
    yield Figure("output", rate, "tokens/s")


def transformers_beside(run: Setting) -> Figures:
    """The same requests by transformers' continuous batching, but for no longer than a while: its rate over that time
    (which leaves out the end, where few sequences run: that is in its favour)."""
    from transformers import AutoConfig, AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

    drop_engine(run)
    longest = 6.0 if run.small else 45.0
    config = AutoConfig.from_pretrained(model_folder(run, "qwen3-0.6b"))
    with torch.device(run.device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if run.cuda else torch.float32).eval()
    prompts, lengths = benchmark_requests(run)
    drawing = GenerationConfig(do_sample=True, temperature=0.6, top_k=0, eos_token_id=-1, max_new_tokens=max(lengths))
    batching = ContinuousBatchingConfig() if run.cuda else ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=256)
    with model.continuous_batching_context_manager(drawing, timeout=10, continuous_batching_config=batching) as manager:
        _cb_requests(manager, [p[:32] for p in prompts], [4] * len(prompts), longest)
        tokens, taken = _cb_requests(manager, prompts, lengths, longest)
        yield Figure("attention", str(model.config._attn_implementation))
        yield Figure("tokens", tokens, f"of {sum(lengths)}")
        yield Figure("time", taken, "s")
        yield Figure("transformers' output", tokens / taken, "tokens/s")
    del manager, model
    if "benchmark" not in run.kept:
        for _ in benchmark(run):
            pass
    yield Figure("ours", run.kept["benchmark"] / (tokens / taken), "times transformers'", ">=", TIMES_TRANSFORMERS)


def _cb_requests(manager: Any, prompts: list[list[int]], lengths: list[int], longest: float) -> tuple[int, float]:
    """Output tokens of all requests after `longest` seconds at most, and the seconds."""
    begun = time.perf_counter()
    asked = [
        manager.add_request(prompt, max_new_tokens=length, eos_token_id=-1)
        for prompt, length in zip(prompts, lengths, strict=True)
    ]
    tokens = finished = 0
    while finished < len(prompts) and time.perf_counter() - begun < longest:
        if (result := manager.get_result(timeout=0.1)) is not None and result.is_finished():
            if result.error:
                raise RuntimeError(result.error)
            tokens += len(result.generated_tokens)
            finished += 1
        elif not manager.is_running():
            raise RuntimeError("transformers' generation thread has ended")
    # `get_result` returns finished requests alone; its scheduler knows of the others.
    taken = time.perf_counter() - begun
    running = list(manager.batch_processor.scheduler.active_requests.values())
    tokens += sum(len(state.generated_tokens) for state in running)
    for request in asked if finished < len(prompts) else ():
        manager.cancel_request(request)
    return tokens, taken
