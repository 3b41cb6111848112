"""The same text as transformers, in every mode of the engine; and draws that follow the distribution."""

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
from miniserve.ops.decoder import Batch, Sizes
from miniserve.sampling_params import SamplingParams
from miniserve.worker.sampler import Sampler
from miniserve.worker.sequence import Sequence
from scripts.gpu.common import Figure, Figures, Setting, drain, greedy
from scripts.gpu.kernels import short
from tests.support import tiny
from tests.support.engines import prompts
from tests.support.whole import check_pool

ARCHITECTURES = {"llama": 64, "qwen2": 64, "qwen3": 128, "mistral": 128} | dict.fromkeys(tiny.NEWER, 64)
"""Each with a size of heads that FlashInfer's kernels are compiled for."""
TOKENS = 48
SHORT = 12
"""Tokens of an answer in bf16: close calls come soon and after one nothing can be compared; so more, shorter ones."""
VOCAB = 320
ROUNDING = 3e-5
"""Two fp32 logits that differ by less (as a part of the largest) may change places by the order of a sum alone."""
BESIDE = 1.5
"""How much larger than transformers' own bf16 error ours may be: both round, each in places of its own."""
UNLIKELY = 1e-4
"""A chi-square test must not find the draws less likely than this."""


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


def parity(run: Setting, arch: str, dtype: torch.dtype) -> Figures:
    """Logits and greedy text of one architecture."""
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
    ours = float(error.square().mean().sqrt() / wanted.square().mean().sqrt())
    if dtype is torch.float32:
        return 2 * ROUNDING * largest, [Figure("error of logits", float(error.max()) / largest, "", "<=", ROUNDING)]
    theirs = reference(run, folder, dtype)(torch.tensor([tokens], device=run.device)).logits[0].double() - wanted
    other = float(theirs.square().mean().sqrt() / wanted.square().mean().sqrt())
    # Twice the worst that was seen of either: one logit may be too high while the other is too low.
    tolerance = 2 * max(float(error.max()), float(theirs.abs().max()))
    return tolerance, [
        Figure("error of logits against fp32", ours, "root mean square, relative", "<=", BESIDE * other),
        Figure("transformers' own error in this dtype", other, "root mean square, relative"),
        Figure("closest logits whose order is judged", tolerance, "apart"),
    ]


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


def modes(run: Setting, dtype: torch.dtype) -> Figures:
    """Graphs on and off, overlap on and off, and the same request with stops and draws in each."""
    arch = "qwen3"
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


# --- draws ----------------------------------------------------------------------------------------------------------

FILTERS: dict[str, dict[str, Any]] = {
    "no filter": {},
    "top_k 20": {"top_k": 20},
    "top_p 0.9": {"top_p": 0.9},
    "min_p 0.05": {"min_p": 0.05},
    "top_k 40, top_p 0.95, min_p 0.01": {"top_k": 40, "top_p": 0.95, "min_p": 0.01},
}


@torch.no_grad()
def sampling(run: Setting) -> Figures:
    """Seeded draws against the exact distribution, and the same draw for the same seed in any company.

    In fp32, where our logits are the reference's: it is the draws that are under test.
    """
    dtype, count = torch.float32, 512 if run.small else 4096
    folder = model(run, "llama", dtype)
    llm, prompt = small_llm(run, folder, dtype), prompts(4, seed=2)[-1]
    raw = reference(run, folder, dtype)(torch.tensor([prompt], device=run.device)).logits[0, -1].double().cpu()
    for name, filters in FILTERS.items():
        params = [
            SamplingParams(temperature=2.0, seed=seed, max_tokens=1, ignore_eos=True, **filters)
            for seed in range(count)
        ]
        draws = [tokens[0] for tokens in text(llm, [prompt] * count, params)]
        exact = distribution(raw, params[0])
        seen = torch.bincount(torch.tensor(draws), minlength=len(exact)).double()
        yield Figure(f"{name}: draws that are filtered out", int(seen[exact == 0].sum()), f"of {count}", "==", 0)
        yield Figure(f"{name}: probability of such draws", chi_square(seen, exact), "chi-square", ">=", UNLIKELY)
        again = [tokens[0] for tokens in text(llm, [prompt] * 7, params[:7])]
        yield Figure(f"{name}: same seed, other batch, same draw", sum(map(int.__eq__, again, draws)), "of 7", "==", 7)
    yield from _by_kernels(run, 512 if run.small else 4096)
    greedy_again = text(llm, [prompt], SamplingParams(temperature=2.0, top_k=1, seed=1, max_tokens=1, ignore_eos=True))
    yield Figure("top_k 1 is greedy", int(greedy_again[0][0] == int(raw.argmax())), "", "==", 1)


def _by_kernels(run: Setting, count: int) -> Figures:
    """The same of the kernels that serve, over given logits of a larger vocabulary."""
    device, vocab = torch.device(run.device), 1000 if run.small else 32000
    ops, kernels = make_ops(device, run.half, Sizes(8, 64, (576,)))
    raw = torch.randn(vocab, generator=torch.Generator().manual_seed(0)) * 3
    for name, filters in FILTERS.items():
        params = SamplingParams(temperature=0.9, ignore_eos=True, **filters)
        rows = [Sequence(str(seed), [1], params, seed, b"") for seed in range(count)]
        logits = raw.to(device).expand(count, -1).clone()
        draws = [token for token, _ in Sampler(frozenset(), ops).sample(logits, rows).read()]
        exact = distribution(raw.double(), params)
        seen = torch.bincount(torch.tensor(draws), minlength=vocab).double()
        beyond = int(seen[exact == 0].sum())
        yield Figure(f"{name}, {kernels}: draws that are filtered out", beyond, f"of {count}", "==", 0)
        yield Figure(f"{name}, {kernels}: probability of such draws", chi_square(seen, exact), "", ">=", UNLIKELY)


def distribution(raw: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """Of the next token: top_k and min_p first, top_p counts in what they leave."""
    probs, order = (raw / params.temperature).softmax(-1).sort(descending=True)
    keep = probs >= params.min_p * probs[0]
    if params.top_k > 0:
        keep &= torch.arange(len(probs)) < params.top_k
    kept = probs * keep
    if params.top_p < 1:
        kept *= kept.cumsum(-1) - kept < params.top_p * kept.sum()
    return torch.zeros_like(raw).scatter_(0, order, kept / kept.sum())


def chi_square(seen: torch.Tensor, exact: torch.Tensor) -> float:
    """How likely counts at least as far off are, by Pearson's test; what is expected fewer than 5 times is one bin."""
    expected = exact * seen.sum()
    rare = expected < 5
    seen = torch.cat((seen[~rare], seen[rare].sum().unsqueeze(0)))
    expected = torch.cat((expected[~rare], expected[rare].sum().unsqueeze(0)))
    seen, expected = seen[expected > 0], expected[expected > 0]
    statistic = ((seen - expected).square() / expected).sum()
    return float(torch.special.gammaincc(torch.tensor((len(seen) - 1) / 2, dtype=torch.float64), statistic / 2))
