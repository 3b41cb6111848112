"""The same text as transformers, in every mode of the engine."""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from miniserve.hub.check import check_folder
from miniserve.kv.memory import KVMemory, PageShape
from miniserve.kv.states import StateMemory, StateShape
from miniserve.llm import LLM
from miniserve.model.config import ModelConfig
from miniserve.model.shards import Shard
from miniserve.model.transformer import Transformer
from miniserve.model.weights import load_weights
from miniserve.ops import make_ops
from miniserve.ops.decoder import Batch
from miniserve.sampling_params import SamplingParams
from scripts.gpu.common import drain, greedy
from scripts.gpu.kernels import short
from scripts.gpu.setting import Figure, Figures, Setting
from tests.support import tiny
from tests.support.engines import prompts
from tests.support.whole import check_pool

ARCHITECTURES = {"llama": 64, "qwen2": 64, "qwen3": 128, "mistral": 128} | dict.fromkeys(tiny.NEWER, 64)
"""Each with a size of heads that FlashInfer's kernels are compiled for."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOKENS = 48
SHORT = 12
"""Tokens of an answer in bf16: close calls come soon and after one nothing can be compared; so more, shorter ones."""
VOCAB = 320
ROUNDING = 3e-5
"""Two fp32 logits that differ by less (as a part of the largest) may change places by the order of a sum alone."""
BESIDE = 1.5
"""How much larger than transformers' own bf16 error ours may be: both round, each in places of its own."""


def model(run: Setting, arch: str, dtype: torch.dtype) -> Path:
    """A tiny random model of an architecture, its weights in `dtype`; the same file for every check."""
    dim, folder = ARCHITECTURES[arch], run.folder / f"{arch}-{short(dtype)}"
    if not folder.exists():
        tiny.make_model(
            folder,
            arch,
            hidden=4 * dim,
            head_dim=None if arch in ("qwen2", "mistral") else dim,
            rope_scaling="llama3" if arch == "llama" else None,
            tie=arch == "qwen3",
            vocab=VOCAB,
            max_len=1024,
            dtype=dtype,
        )
    return folder


# --- the truth ------------------------------------------------------------------------------------------------------


def reference(run: Setting, folder: Path, dtype: torch.dtype) -> Any:
    """transformers' own model on the device, kept."""
    from transformers import AutoModelForCausalLM

    def make() -> Any:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(run.device).eval()

    return run.keep(f"transformers {folder} {dtype}", make)


@dataclass(frozen=True)
class Truth:
    """What transformers continues a prompt with in fp32, and by how much each token beat the second best."""

    tokens: list[int]
    margins: list[float]


@torch.no_grad()
def paths(run: Setting, folder: Path, items: list[list[int]], count: int = TOKENS) -> list[Truth]:
    """Greedy continuations of `items`, one prompt at a time."""
    truth, found = reference(run, folder, torch.float32), []
    for prompt in items:
        fresh, past, tokens, margins = list(prompt), None, [], []
        while len(tokens) < count:
            out = truth(torch.tensor([fresh], device=run.device), past_key_values=past, use_cache=True)
            past, best = out.past_key_values, out.logits[0, -1].topk(2)
            fresh = [int(best.indices[0])]
            tokens += fresh
            margins.append(float(best.values[0] - best.values[1]))
        found.append(Truth(tokens, margins))
    return found


def disagreements(ours: list[list[int]], truth: list[Truth], tolerance: float) -> tuple[int, int]:
    """How many answers leave the true path where it is clear, and how many tokens were compared. Where the two best
    tokens are closer than `tolerance` either is right, and what follows the other one cannot be compared."""
    wrong = compared = 0
    for answer, path in zip(ours, truth, strict=True):
        for token, expected, margin in zip(answer, path.tokens, path.margins, strict=False):
            if token != expected:
                wrong += margin > tolerance
                break
            compared += 1
        else:
            wrong += len(answer) != len(path.tokens)
    return wrong, compared


# --- parity ---------------------------------------------------------------------------------------------------------


def parity(run: Setting, arch: str, precision: str) -> Figures:
    """Logits and greedy text of one architecture, in `fp32` or `bf16`."""
    dtype = DTYPES[precision]
    folder = model(run, arch, dtype)
    count, length = (8, TOKENS) if dtype is torch.float32 else (24, SHORT)
    items = prompts(count, seed=0)
    truth = paths(run, folder, items, length)
    tolerance, figures = logit_error(run, folder, dtype, items[-1] * 2 + truth[-1].tokens)
    yield from figures
    settings: dict[str, dict[str, Any]] = {"all at once": {}, "in chunks of 24 tokens": {"max_num_batched_tokens": 24}}
    for how, engine in settings.items():
        llm = small_llm(run, folder, dtype, **engine)
        together = text(llm, items, greedy(length))
        wrong, compared = disagreements(together, truth, tolerance)
        yield Figure(f"answers off transformers' path, {how}", wrong, "", "==", 0)
        yield Figure(f"tokens compared, {how}", compared, f"of {count * length}", ">=", count * length / 2)
        if not engine:
            yield Figure("kernels", llm._built.facts.kernels)
            alone = [text(llm, [item], greedy(length))[0] for item in items[:4]]
            wrong, _ = disagreements(alone, truth[:4], tolerance)
            yield Figure("answers off transformers' path, alone, from the cache", wrong, "", "==", 0)
        yield leaks(llm)


@torch.no_grad()
def logit_error(run: Setting, folder: Path, dtype: torch.dtype, tokens: list[int]) -> tuple[float, list[Figure]]:
    """How far two logits may be apart before their order is ours to get right, and figures of our error."""
    wanted = reference(run, folder, torch.float32)(torch.tensor([tokens], device=run.device)).logits[0].double()
    largest = float(wanted.abs().max())
    error = (logits(run, folder, dtype, tokens).double() - wanted).abs()
    if dtype is torch.float32:
        return 2 * ROUNDING * largest, [Figure("error of logits", float(error.max()) / largest, "", "<=", ROUNDING)]
    found = reference(run, folder, dtype)(torch.tensor([tokens], device=run.device)).logits[0].double()
    theirs = (found - wanted).abs()
    experts = ModelConfig.from_hf(check_folder(folder, dummy=False).config).experts is not None
    ours, other = (typical(off, experts) / float(wanted.square().mean().sqrt()) for off in (error, theirs))
    # Twice the worst that was seen of either: one logit may be too high while the other is too low.
    tolerance = 2 * max(float(error.max()), float(theirs.max()))
    how = "relative, of the median row" if experts else "relative, root mean square"
    return tolerance, [
        Figure("error of logits against fp32", ours, how, "<=", BESIDE * other),
        Figure("transformers' own error in this dtype", other, how),
        Figure("closest logits whose order is judged", tolerance, "apart"),
    ]


def typical(error: torch.Tensor, experts: bool) -> float:
    """Of errors `[row, logit]`: the root mean square, with experts that of the median row. Where two experts are as
    good as each other rounding picks one of them, and that row is far off, in one program or in the other."""
    rows = error.square().mean(1)
    return float((rows.median() if experts else rows.mean()).sqrt())


def logits(run: Setting, folder: Path, dtype: torch.dtype, tokens: list[int]) -> torch.Tensor:
    """Ours of all positions, computed in two chunks over shuffled pages."""
    files = check_folder(folder, dummy=False)
    device, config = torch.device(run.device), ModelConfig.from_hf(files.config)
    ops, _ = make_ops(device, dtype, config.sizes, native=device.type == "cuda")
    transformer = Transformer(
        config, load_weights(files.weights, Shard(config), ops, dtype, device, packing={}), ops, config.max_len
    )
    pages = list(range(-(-len(tokens) // 16) + 1))
    random.Random(0).shuffle(pages)
    memory = KVMemory(PageShape(config.kv_layers, 16, config.kv_heads, config.head_dim, dtype), len(pages), device)
    state = None
    if (delta := config.delta) is not None:
        shape = StateShape(**vars(delta), layers=len(config.layers) - config.kv_layers, dtype=dtype)
        slots = StateMemory(shape, 1, memory)
        state = slots.state
    found = []
    for start, end in ((0, len(tokens) // 3), (len(tokens) // 3, len(tokens))):
        rows = torch.arange(end - start, device=device)
        batch = Batch(
            torch.tensor(tokens[start:end], device=device), rows + start, rows, [end - start], [end], [pages], [0]
        )
        found.append(transformer.forward(batch, memory.pages, state))
    return torch.cat(found)


def small_llm(run: Setting, folder: Path, dtype: torch.dtype, **engine: Any) -> LLM:
    """An engine for a tiny model."""
    name = {torch.float32: "float32", torch.bfloat16: "bfloat16"}[dtype]
    settings = {"device": run.device, "dtype": name, "kv_cache_memory": 2**26, "threads": 1}
    return LLM(folder, **settings | engine)


def text(llm: LLM, items: list[list[int]], params: SamplingParams | list[SamplingParams] | None = None) -> Any:
    """What it continues each prompt with, greedily by default."""
    return [g.outputs[0].token_ids for g in llm.generate(items, params or greedy(TOKENS), progress=False)]


def leaks(llm: LLM) -> Figure:
    """Pages still held when all is over."""
    drain(llm.engine)  # a step may be in flight
    check_pool(llm.engine.pool)
    return Figure("pages held afterwards", llm.engine.pool.num_held, "", "==", 0)


def modes(run: Setting, precision: str) -> Figures:
    """Graphs on and off, overlap on and off, and the same request with stops and draws in each."""
    arch, dtype = "qwen3", DTYPES[precision]
    folder = model(run, arch, dtype)
    count, length = (12, TOKENS) if dtype is torch.float32 else (24, SHORT)
    items = prompts(count, seed=1)
    truth = paths(run, folder, items, length)
    tolerance, _ = logit_error(run, folder, dtype, items[-1] * 2 + truth[-1].tokens)
    # Different lengths, so that the batch shrinks through sizes of graphs, and ends that nothing foretells.
    some, ends = [], []
    for i, path in enumerate(truth):
        some_length = length - i % (length // 2)
        stop = path.tokens[some_length // 2]
        end = path.tokens.index(stop) + 1
        some.append(SamplingParams(temperature=0.0, max_tokens=some_length, ignore_eos=True, stop_token_ids=[stop]))
        ends.append(Truth(path.tokens[:end], path.margins[:end]))
    drawn = [SamplingParams(temperature=0.8, top_p=0.95, seed=i, max_tokens=16, ignore_eos=True) for i in range(count)]
    first: Any = None
    for eager in (True, False):
        for overlap in (False, True):
            llm = small_llm(run, folder, dtype, enforce_eager=eager, async_scheduling=overlap)
            how = f"{'eager' if eager else 'graphs'}, {'overlap' if overlap else 'no overlap'}"
            answers = [text(llm, items, greedy(length)), text(llm, items, some), text(llm, items, drawn)]
            wrong, compared = disagreements(answers[0], truth, tolerance)
            yield Figure(f"answers off transformers' path, {how}", wrong, "", "==", 0)
            yield Figure(f"tokens compared, {how}", compared, f"of {count * length}", ">=", count * length / 2)
            wrong, _ = disagreements(answers[1], ends, tolerance)
            yield Figure(f"answers wrong that stop early, {how}", wrong, "", "==", 0)
            yield leaks(llm)
            first = first or answers
            same = sum(map(list.__eq__, chain(*first), chain(*answers)))
            # In bf16 a batch of another shape may round differently: only reported. In fp32 all must be the same.
            rule, most = "==" if dtype is torch.float32 else "", 3 * count
            yield Figure(f"answers, draws too, as in the first mode, {how}", same, f"of {most}", rule, most)
