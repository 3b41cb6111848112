"""Penalties against the plain formula over all tokens of a sequence, whatever is known of them on the host."""

from __future__ import annotations

import gc
import random
from collections import Counter
from typing import Any

import pytest
import torch

from miniserve.ops.torch_ops import TorchOps
from miniserve.sampling_params import SamplingParams
from miniserve.worker.sampler import TAIL, Penalties, Sampler
from miniserve.worker.sequence import Sequence
from tests.support.engines import clean, prompts, small

CPU = torch.device("cpu")
VOCAB = 60
KINDS: list[dict[str, Any]] = [
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.6},
    {"presence_penalty": 0.7},
    {"frequency_penalty": -0.4},
    {"repetition_penalty": 1.2, "presence_penalty": -0.3, "frequency_penalty": 0.5},
    {},
]


def plain(row: torch.Tensor, prompt: list[int], outputs: list[int], params: SamplingParams) -> torch.Tensor:
    """What penalties make of float32 logits `[vocab]`, token by token."""
    row = row.clone()
    penalty = torch.tensor(params.repetition_penalty)
    for token in {*prompt, *outputs}:
        row[token] = row[token] / penalty if row[token] > 0 else row[token] * penalty
    for token, count in Counter(outputs).items():
        row[token] -= torch.tensor(params.frequency_penalty) * count + torch.tensor(params.presence_penalty)
    return row


@pytest.mark.parametrize("ahead", [False, True], ids=["", "overlap"])
def test_they_are_the_plain_formula(ahead: bool) -> None:
    """To the last bit, in batches of any company, for prompts and outputs of any length, also those of another worker
    before (`prior`). With overlap the host does not know the last token, which only the device has."""
    pick, noise = random.Random(int(ahead)), torch.Generator().manual_seed(int(ahead))
    penalties = Penalties()
    alive: list[Sequence] = []
    for step in range(3 * TAIL):
        if len(alive) < 9 and pick.random() < 0.3:
            tokens = [pick.randrange(VOCAB) for _ in range(pick.choice([1, 5, TAIL, 150]))]
            params = SamplingParams(**pick.choice(KINDS))
            alive.append(Sequence(str(step), tokens, params, 0, b"", prior=pick.randrange(len(tokens))))
        batch = pick.sample(alive, pick.randrange(len(alive) + 1))
        if not any(sequence.params.penalized for sequence in batch):
            continue
        latest = [pick.randrange(VOCAB) for _ in alive]
        for sequence in alive:
            sequence.sampling = ahead and pick.random() < 0.8
        logits = torch.randn(len(batch), VOCAB, generator=noise)
        wanted = []
        for row, sequence in zip(logits, batch, strict=True):
            seen = sequence.tokens + [latest[alive.index(sequence)]] * sequence.sampling
            start = sequence.given - sequence.prior
            wanted.append(plain(row, seen[:start], seen[start:], sequence.params))
        penalized = {row: sequence for row, sequence in enumerate(batch) if sequence.params.penalized}
        unknown = [latest[alive.index(s)] for s in penalized.values() if s.sampling]
        penalties.apply(logits, penalized, torch.tensor(unknown))
        torch.testing.assert_close(logits, torch.stack(wanted), rtol=0, atol=0)
        for sequence, token in zip(alive, latest, strict=True):
            sequence.sampling = False
            sequence.tokens += [token] * pick.randrange(3)
        alive = [sequence for sequence in alive if pick.random() < 0.98]


@pytest.mark.parametrize("overlap", [False, True], ids=["", "overlap"])
def test_text_is_that_of_the_plain_formula(tiny_models, monkeypatch: pytest.MonkeyPatch, overlap: bool) -> None:
    """With prompts in pieces, and preemptions. The logits that each output was chosen from are kept, and it is chosen
    again when all are known."""
    seen: dict[tuple[str, int], torch.Tensor] = {}
    found: dict[str, Sequence] = {}
    sample = Sampler.sample

    def noted(self: Sampler, logits: torch.Tensor, sequences: list[Sequence], *more: Any) -> Any:
        for row, sequence in zip(logits, sequences, strict=True):
            seen[sequence.turn, sequence.num_outputs + sequence.sampling] = row.clone()
            found[sequence.turn] = sequence
        return sample(self, logits, sequences, *more)

    monkeypatch.setattr(Sampler, "sample", noted)
    llm = small(
        tiny_models["llama"],
        async_scheduling=overlap,
        prompt_lookup=False,
        max_num_batched_tokens=24,
        max_model_len=192,
        kv_cache_memory=3 * 2**16,
    )
    items = prompts(12, longest=90, seed=4)
    params = [SamplingParams(temperature=0, max_tokens=80, ignore_eos=True, **KINDS[i % 6]) for i in range(12)]
    texts = [g.outputs[0].token_ids for g in llm.generate(items, params, progress=False)]
    assert llm.engine.counters.preemptions > 3
    assert clean(llm)
    by_prompt = {tuple(sequence.tokens[: sequence.given]): turn for turn, sequence in found.items()}
    for prompt, text, p in zip(items, texts, params, strict=True):
        turn = by_prompt[tuple(prompt)]
        again = [int(plain(seen[turn, i], prompt, text[:i], p).argmax()) for i in range(80)]
        assert text == again


def test_memory_is_bounded_and_goes_with_the_sequence() -> None:
    sampler = Sampler(frozenset(), TorchOps(CPU, torch.float32))
    params = SamplingParams(temperature=0, repetition_penalty=1.1)
    sequences = [Sequence(str(i), [i + 1] * 1000, params, 0, b"") for i in range(4)]
    kept = sampler._penalties._kept
    for _ in range(3 * TAIL):
        tokens = sampler.sample(torch.randn(4, VOCAB), sequences).tokens.tolist()
        for sequence, token in zip(sequences, tokens, strict=True):
            sequence.tokens.append(token)
    assert [ids.nbytes for ids in kept.values()] == [4 * (1000 + 2 * TAIL)] * 4, "4 bytes a token, but for the last few"
    del sequences[1:], sequence
    sampler.sample(torch.randn(1, VOCAB), sequences)  # what was sampled last is remembered
    gc.collect()
    assert len(kept) == 1
