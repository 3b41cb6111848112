"""Greedy text equals transformers' for the same weights, whatever the engine does in between."""

from __future__ import annotations

import random

import pytest
import torch

from miniserve.ops.decoder import Batch, State
from miniserve.ops.torch_ops import native_bf16
from miniserve.sampling_params import SamplingParams
from miniserve.worker import engine as worker_engine
from miniserve.worker.sequence import Sequence
from tests.support import tiny
from tests.support.engines import clean, greedy, prompts, small
from tests.support.native_kernels import op_by_op
from tests.support.tiny import reference

pytestmark = pytest.mark.slow

TOKENS = 64
OVERLAP = pytest.mark.parametrize("overlap", [False, True], ids=["", "overlap"])
"""Whether a step is launched before the one before it has told what it sampled."""
ARCHS = ("llama", "llama3", "qwen2", "qwen3", "mistral")
EVERY = (*ARCHS, *tiny.NEWER)


@pytest.fixture(scope="session")
def models(tiny_models, newer_models):
    return tiny_models | newer_models


@pytest.fixture(scope="session")
def expected(models):
    """Prompts and what transformers continues them with, by architecture."""
    items = prompts(8)
    return {arch: (items, reference(models[arch], items, TOKENS)) for arch in EVERY}


@pytest.mark.parametrize("outputs", ["some", "none"])
@pytest.mark.parametrize("dtype", ["float32", *(["bfloat16"] if native_bf16() else [])])
@pytest.mark.parametrize("arch", EVERY)
def test_the_model_in_one_call_is_the_model(models, arch, dtype, outputs):
    """The same kernels in the same order: equal to the last bit, but where an operation between them is torch's (the
    softmax of a router, gates of attention and of the delta net) or what experts add up to is rounded once less."""
    exact = arch in (*ARCHS, "gemma3")
    if dtype == "bfloat16" and arch in ("mixtral", "qwen3_moe", "qwen3_next", "qwen3_5_moe"):
        pytest.skip("where two experts are nearly as good, rounding decides")
    llm = small(models[arch], dtype=dtype)
    transformer = llm.engine.runner.transformer
    if transformer._fused is None:
        pytest.skip("no native kernels here")
    torch.manual_seed(1)
    pool = torch.randn_like(llm._built.memory.pages.float()).to(llm._built.memory.pages.dtype)[:40]
    lengths, contexts = [1, 70, 5, 1], [33, 70, 64, 1]
    positions = [p for length, context in zip(lengths, contexts, strict=True) for p in range(context - length, context)]
    batch = Batch(
        tokens=torch.randint(256, (77,)),
        positions=torch.tensor(positions),
        outputs=torch.tensor([0, 70, 71, 76] if outputs == "some" else [], dtype=torch.int64),
        lengths=lengths,
        contexts=contexts,
        pages=[[3, 1, 2], [30, 12, 9, 8, 7], [20, 21, 22, 23], [39]],
        slots=[2, 0, 3, 1] if llm.engine.runner.state else [],
    )
    whole, parts, states = pool.clone(), pool.clone(), (None, None)
    if (state := llm.engine.runner.state) is not None:
        conv, delta = torch.randn_like(state.conv), torch.randn_like(state.delta)
        states = State(conv.clone(), delta.clone()), State(conv.clone(), delta.clone())
    plan = transformer.ops.plan(batch, parts, states[0])
    wanted = op_by_op(transformer).compute(plan, batch.tokens, batch.positions, batch.outputs)
    pairs = [(transformer.forward(batch, whole, states[1]), wanted), (whole, parts)]
    if state is not None:
        pairs += [(states[1].conv, states[0].conv), (states[1].delta, states[0].delta)]
        assert not torch.equal(states[0].delta, delta)
    for one, other in pairs:  # logits, and the same KV in the same slots
        if exact:
            assert torch.equal(one, other)
        elif one.numel():
            limit = 2e-5 if dtype == "float32" else 5e-2
            assert (one.double() - other).abs().max() < limit * other.double().abs().max()
    assert not torch.equal(whole, pool)


@pytest.mark.parametrize("kernels", ["auto", "torch"])
@pytest.mark.parametrize("arch", EVERY)
def test_alone(models, expected, arch, kernels):
    items, texts = expected[arch]
    llm = small(models[arch], cpu_kernels=kernels)
    assert kernels == "torch" or llm._built.facts.kernels == "native" or "g++" in llm._built.facts.kernels
    assert [greedy(llm, [item])[0] for item in items] == texts
    assert len({tuple(text) for text in texts}) > 1, "the reference itself says nothing"
    assert clean(llm)


@pytest.mark.parametrize("arch", EVERY)
@pytest.mark.parametrize(
    ("chunk", "kernels", "overlap"),
    [
        (1, "auto", False),
        (7, "auto", True),
        (7, "torch", False),
        (16, "auto", False),
        (64, "auto", True),
        (512, "auto", False),
        (512, "torch", True),
    ],
)
def test_mixed_batch_any_chunk(models, expected, arch, chunk, kernels, overlap):
    items, texts = expected[arch]
    llm = small(models[arch], max_num_batched_tokens=chunk, cpu_kernels=kernels, async_scheduling=overlap)
    assert greedy(llm, items) == texts
    assert clean(llm)


@pytest.mark.parametrize("block_size", [1, 8, 32])
def test_page_sizes(tiny_models, expected, block_size):
    items, texts = expected["llama"]
    llm = small(tiny_models["llama"], block_size=block_size)
    assert greedy(llm, items) == texts
    assert clean(llm)


@OVERLAP
@pytest.mark.parametrize("arch", ARCHS)
def test_prefix_hits(tiny_models, arch, overlap):
    """Prompts that share beginnings, asked again and continued: from cache the text is the same."""
    base = prompts(6, seed=1)[-1] * 2
    items = [base, base[:40], [*base[:48], 3, 4, 5], [*base, 9], base]
    texts = reference(tiny_models[arch], items, TOKENS)
    llm = small(tiny_models[arch], async_scheduling=overlap, max_num_batched_tokens=32)
    assert greedy(llm, items) == texts
    params = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
    again = llm.generate(items, params, progress=False)
    assert [g.outputs[0].token_ids for g in again] == texts
    assert again[0].cached_tokens == (len(base) - 1) // 16 * 16
    # The second turn of a conversation: prompt, answer, more.
    longer = items[0] + texts[0] + [7, 8, 9]
    turn = llm.generate([longer], params, progress=False)[0]
    assert turn.outputs[0].token_ids == reference(tiny_models[arch], [longer], TOKENS)[0]
    assert turn.cached_tokens == (len(items[0]) + TOKENS - 1) // 16 * 16
    assert clean(llm)


@OVERLAP
@pytest.mark.parametrize("caching", [True, False])
def test_preemption(tiny_models, expected, caching, overlap):
    """A pool that holds a third of what the batch wants: sequences are preempted and recomputed."""
    items, texts = expected["llama"]
    llm = small(tiny_models["llama"], async_scheduling=overlap, max_model_len=256, enable_prefix_caching=caching)
    per_page = llm._built.memory.shape.bytes
    llm = small(
        tiny_models["llama"],
        async_scheduling=overlap,
        max_model_len=256,
        enable_prefix_caching=caching,
        kv_cache_memory=20 * per_page,
    )
    assert greedy(llm, items) == texts
    assert llm.engine.counters.preemptions > 0
    assert clean(llm)


@OVERLAP
def test_eviction(tiny_models, overlap):
    """Far more prompts than the pool can remember, each asked twice."""
    items = prompts(40, seed=2)
    texts = reference(tiny_models["qwen3"], items, 8)
    llm = small(tiny_models["qwen3"], async_scheduling=overlap, max_model_len=256, kv_cache_memory=400_000)
    assert llm.engine.pool.num_pages < sum(len(i) // 16 for i in items)
    assert greedy(llm, items, 8) == texts
    assert greedy(llm, list(reversed(items)), 8) == list(reversed(texts))
    assert clean(llm)


@OVERLAP
def test_abort_at_any_moment(tiny_models, expected, overlap):
    """Aborted sequences free their pages and disturb nobody."""
    items, texts = expected["llama"]
    llm = small(tiny_models["llama"], async_scheduling=overlap, max_num_batched_tokens=24)
    engine, pick = llm.engine, random.Random(3)
    params = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True)
    got: dict[str, list[int]] = {}
    for i, item in enumerate(items * 2):
        engine.add(Sequence(str(i), item, params, 0, b"root"))
        got[str(i)] = []
    doomed = pick.sample(sorted(got), 6)
    while engine.waiting or engine.running:
        engine.admit()
        for output in engine.step().outputs:
            got[output.turn] += output.tokens
        if doomed and pick.random() < 0.2:
            engine.abort(doomed.pop())
    aborted = {turn for turn, tokens in got.items() if len(tokens) < TOKENS}
    assert 0 < len(aborted) <= 6
    for turn, tokens in got.items():
        want = texts[int(turn) % len(items)]
        assert tokens == want[: len(tokens)]
    assert clean(llm)


@OVERLAP
def test_sampling_is_reproducible_in_any_batch(tiny_models, overlap):
    """The same seed gives the same text alone, in a batch, and after preemption."""
    items = prompts(8, seed=4)
    params = [
        SamplingParams(temperature=0.9, top_p=0.95, top_k=40, seed=seed, max_tokens=24, ignore_eos=True)
        for seed in range(8)
    ]
    llm = small(tiny_models["llama"], async_scheduling=overlap)
    alone = [llm.generate([i], p, progress=False)[0].outputs[0].token_ids for i, p in zip(items, params, strict=True)]
    together = [g.outputs[0].token_ids for g in llm.generate(items, params, progress=False)]
    assert together == alone
    other = [SamplingParams(temperature=0.9, seed=99, max_tokens=24, ignore_eos=True)] * 8
    assert [g.outputs[0].token_ids for g in llm.generate(items, other, progress=False)] != alone


@pytest.mark.parametrize("arch", ["llama", "gemma3", "qwen3_moe", "qwen3_5", "qwen3_5_moe"])
def test_bf16_text_is_the_same_in_any_batch(tmp_path, arch):
    """Native kernels compute each row alike whatever shares its batch, so even rounding does not tell."""
    folder = tiny.make_model(tmp_path / "m", arch, hidden=576, heads=9, kv_heads=3, dtype=torch.bfloat16, seed=6)
    llm = small(folder, dtype="bfloat16")
    if llm._built.facts.kernels != "native":
        pytest.skip(f"kernels: {llm._built.facts.kernels}")
    items = prompts(10, seed=9)
    for temperature in (0.0, 0.9):
        params = [
            SamplingParams(temperature=temperature, seed=seed, max_tokens=32, ignore_eos=True) for seed in range(10)
        ]
        alone = [
            llm.generate([i], p, progress=False)[0].outputs[0].token_ids for i, p in zip(items, params, strict=True)
        ]
        for chunk in (7, 512):
            other = small(folder, dtype="bfloat16", max_num_batched_tokens=chunk)
            assert [g.outputs[0].token_ids for g in other.generate(items, params, progress=False)] == alone


@OVERLAP
def test_long_prompt_does_not_stall_decodes(tiny_models, overlap):
    """While a long prompt is prefilled in chunks, a running stream gets a token in each step."""
    llm = small(tiny_models["llama"], async_scheduling=overlap, max_num_batched_tokens=32)
    engine = llm.engine
    params = SamplingParams(temperature=0, max_tokens=50, ignore_eos=True)
    engine.add(Sequence("stream", [1, 2, 3], params, 0, b""))
    engine.admit()
    engine.step()
    engine.add(Sequence("long", list(range(250)) * 1, params, 0, b""))
    steps = 0
    while (sequence := engine.find("long")) is None or sequence.computed < 250:
        engine.admit()
        assert [o.turn for o in engine.step().outputs if o.turn == "stream"] == ["stream"]
        steps += 1
    assert steps == -(-250 // 31) + overlap


@OVERLAP
def test_same_prefix_is_computed_once(tiny_models, overlap):
    """Many prompts with one beginning that arrive together: the beginning is computed by one of them."""
    base = prompts(9, seed=5)[-1] + list(range(200))
    items = [[*base, i] for i in range(6)]
    llm = small(tiny_models["llama"], async_scheduling=overlap, max_num_batched_tokens=64)
    assert greedy(llm, items, 4) == reference(tiny_models["llama"], items, 4)
    fresh = len(base) // 16 * 16
    assert llm.engine.counters.prompt_tokens < fresh + 6 * 20


class Oracle:
    """In place of a `Drafter`: knows how all texts go on, and errs now and then."""

    texts: list[list[int]]

    def __init__(self, rows: int) -> None:
        self._pick = random.Random(1)

    def draft(self, tokens: list[int], most: int) -> list[int]:
        (text,) = (text for text in self.texts if text[: len(tokens)] == tokens)
        draft = text[len(tokens) :][: self._pick.randrange(most + 1)] if most > 0 else []
        return [token if self._pick.random() < 0.8 else (token + 1) % 256 for token in draft]

    def observe(self, drafted: int, held: int) -> None:
        assert 0 <= held <= drafted > 0


@OVERLAP
@pytest.mark.parametrize("arch", ARCHS)
def test_drafts(tiny_models, expected, monkeypatch, arch, overlap):
    """Drafts that hold for a while, alone and beside prompts and other decodes."""
    items, texts = expected[arch]
    monkeypatch.setattr(worker_engine, "Drafter", Oracle)
    monkeypatch.setattr(Oracle, "texts", [item + text for item, text in zip(items, texts, strict=True)], raising=False)
    llm = small(tiny_models[arch], async_scheduling=overlap, prompt_lookup=True, max_num_batched_tokens=32)
    assert [greedy(llm, [item])[0] for item in items] == texts
    assert greedy(llm, items) == texts
    counters = llm.engine.counters
    assert counters.drafted_tokens > counters.held_tokens > 500
    assert counters.steps < 0.7 * counters.generated_tokens
    assert clean(llm)


def test_drafts_change_nothing_that_is_sampled(tiny_models):
    """Each position draws with its own number: a draft holds only where the very token would have been drawn."""
    pick = random.Random(3)
    items = [[pick.randrange(4) for _ in range(80)] for _ in range(6)]
    for params in (
        {"temperature": 0.6, "logit_bias": dict.fromkeys(range(4), 30.0), "logprobs": 3},
        {"temperature": 0.9, "top_p": 0.9, "top_k": 20, "logit_bias": dict.fromkeys(range(3), 30.0)},
        {"temperature": 0.0, "stop_token_ids": [2], "min_tokens": 7, "logprobs": 0},
        {"temperature": 0.6, "repetition_penalty": 1.2, "logit_bias": dict.fromkeys(range(4), 30.0)},
    ):
        found = []
        for lookup in (False, True):
            llm = small(tiny_models["llama"], prompt_lookup=lookup)
            each = [SamplingParams(seed=i, max_tokens=30, **params) for i in range(6)]
            found.append([g.outputs for g in llm.generate(items, each, progress=False)])
            held = llm.engine.counters.held_tokens
            assert clean(llm)
        if llm._built.facts.kernels == "native":
            assert found[0] == found[1]
        else:  # torch's products differ in the last bits with the number of rows, and so do log-probabilities
            texts = [[[choice.token_ids for choice in outputs] for outputs in run] for run in found]
            assert texts[0] == texts[1]
        assert (held > 20) == ("repetition_penalty" not in params) or "stop_token_ids" in params


@pytest.mark.parametrize("pages", [12, 20, 40])
def test_drafts_take_no_page_from_others(tiny_models, pages):
    """In a pool that is too small for all, drafts end where the pages do."""
    items = [[5, 6, 7, 8] * 8 for _ in range(5)]
    llm = small(tiny_models["qwen3"], max_model_len=128)
    page = llm._built.memory.shape.bytes
    llm = small(tiny_models["qwen3"], max_model_len=128, kv_cache_memory=pages * page, enable_prefix_caching=False)
    assert greedy(llm, items, 60) == reference(tiny_models["qwen3"], items, 60)
    assert clean(llm)
