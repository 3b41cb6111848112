"""Draws that follow the distribution."""

from __future__ import annotations

from typing import Any

import torch

from miniserve.ops import make_ops
from miniserve.ops.decoder import Sizes
from miniserve.sampling_params import SamplingParams
from miniserve.worker.sampler import Sampler
from miniserve.worker.sequence import Sequence
from scripts.gpu.parity import model, reference, small_llm, text
from scripts.gpu.setting import Figure, Figures, Setting
from tests.support.engines import prompts

UNLIKELY = 1e-4
"""A chi-square test must not find the draws less likely than this."""
FILTERS: dict[str, dict[str, Any]] = {
    "no filter": {},
    "top_k 20": {"top_k": 20},
    "top_p 0.9": {"top_p": 0.9},
    "min_p 0.05": {"min_p": 0.05},
    "top_k 40, top_p 0.95, min_p 0.01": {"top_k": 40, "top_p": 0.95, "min_p": 0.01},
}


@torch.no_grad()
def check(run: Setting) -> Figures:
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
