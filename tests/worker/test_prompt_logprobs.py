"""Log-probabilities of the prompt's tokens: those of transformers, however the prompt is computed, and exactly once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
import torch

from miniserve.cluster.messages import FirstToken, Release, TokenLogprob
from miniserve.kv.hashing import root_hash
from miniserve.llm import LLM
from miniserve.sampling_params import SamplingParams
from miniserve.worker import runner
from miniserve.worker.sequence import Sequence
from miniserve.worker.step import StepResult
from tests.support.engines import clean, prompts, small
from tests.support.handoff_pair import PROMPT, Pair, Side
from tests.support.tiny import reference, reference_logits

SCORED = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, prompt_logprobs=3)


def check(folder: Path, prompt: list[int], found: list[TokenLogprob] | None, top: int = 3) -> None:
    """`found` is what transformers says of the tokens after the first one."""
    wanted = reference_logits(folder, prompt).log_softmax(-1)[:-1]
    assert found is not None
    assert [entry.token for entry in found] == prompt[1:]
    own = wanted[range(len(prompt) - 1), prompt[1:]]
    assert torch.allclose(torch.tensor([entry.logprob for entry in found]), own, atol=1e-4)
    # Of those that are so close that rounding decides, either may be first.
    for entry, row, value in zip(found, wanted, own, strict=True):
        assert (row > value + 1e-4).sum() < entry.rank <= (row > value - 1e-4).sum() + 1
        assert torch.allclose(torch.tensor([p for _, p in entry.top]), row.topk(top).values, atol=1e-4)
        assert all(abs(row[token] - logprob) < 1e-4 for token, logprob in entry.top)


def check_all(folder: Path, llm: LLM, items: list[list[int]], params: SamplingParams = SCORED) -> None:
    done = llm.generate(items, params, progress=False)
    for item, output in zip(items, done, strict=True):
        check(folder, item, output.prompt_logprobs)
    assert clean(llm)


@pytest.mark.parametrize("overlap", [False, True], ids=["", "overlap"])
@pytest.mark.parametrize(("chunk", "kernels"), [(1, "auto"), (7, "torch"), (64, "auto"), (512, "auto")])
@pytest.mark.parametrize("arch", ["llama", "qwen3"])
def test_they_are_those_of_transformers(tiny_models, arch, chunk, kernels, overlap) -> None:
    """In any chunks, of prompts of one token and more, beside prompts and decodes of others."""
    folder = tiny_models[arch]
    llm = small(folder, max_num_batched_tokens=chunk, cpu_kernels=kernels, async_scheduling=overlap)
    items = prompts(7, seed=4)
    plain = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    done = llm.generate(items * 2, [SCORED] * len(items) + [plain] * len(items), progress=False)
    assert [output.outputs[0].token_ids for output in done] == reference(folder, items, 12) * 2
    for item, output in zip(items, done, strict=False):
        check(folder, item, output.prompt_logprobs)
    assert all(output.prompt_logprobs is None for output in done[len(items) :])
    assert clean(llm)


def test_never_all_logits_at_once(tiny_folder, monkeypatch) -> None:
    """As many rows as the limit allows, and the rest in further blocks."""
    made = []
    llm = small(tiny_folder)
    model = llm.engine.runner.transformer
    head = model.head
    monkeypatch.setattr(model, "head", lambda hidden: made.append(len(hidden)) or head(hidden))
    monkeypatch.setattr(runner, "SCORED_LOGITS", 320 * 50)
    prompt = prompts(4, seed=6, longest=400)[3] + [5] * 120
    check_all(tiny_folder, llm, [prompt])
    assert max(made) == 50
    assert sum(made[: made.index(1)]) == len(prompt) - 1


@pytest.mark.parametrize("cached", ["before", "beside"])
def test_a_cached_prefix_is_computed_again(tiny_folder, cached) -> None:
    """And what was scored serves other prompts as prefix."""
    llm = small(tiny_folder, max_num_batched_tokens=32)
    (item,) = prompts(4, seed=7)[3:]
    item = item * 3
    plain = SamplingParams(temperature=0, max_tokens=2)
    if cached == "before":
        llm.generate([item], plain, progress=False)
        check_all(tiny_folder, llm, [item])
    else:
        done = llm.generate([item, item, item], [plain, SCORED, SCORED], progress=False)
        for output in done[1:]:
            check(tiny_folder, item, output.prompt_logprobs)
    (scored,) = llm.generate([item], SCORED, progress=False)
    assert scored.cached_tokens == 0
    (again,) = llm.generate([item], plain, progress=False)
    assert again.cached_tokens == (len(item) - 1) // 16 * 16
    assert clean(llm)


@pytest.mark.parametrize("overlap", [False, True], ids=["", "overlap"])
@pytest.mark.parametrize("caching", [False, True], ids=["", "caching"])
def test_a_prompt_that_gives_way_in_its_middle(tiny_folder, overlap, caching) -> None:
    """Others grow into the pool while it is computed in small pieces."""
    engine = {"max_model_len": 256, "enable_prefix_caching": caching, "async_scheduling": overlap}
    page = small(tiny_folder, max_model_len=256)._built.memory.shape.bytes
    llm = small(tiny_folder, kv_cache_memory=18 * page, max_num_batched_tokens=5, **engine)
    streams = [prompt[:14] for prompt in prompts(5, seed=9)[2:]]
    scored = [*range(150)]
    long = SamplingParams(temperature=0, max_tokens=60, ignore_eos=True)
    seen = []
    preempt = llm.engine._preempt
    llm.engine._batching.preempt = lambda s: seen.append((s.scoring, s.computed)) or preempt(s)
    done = llm.generate([*streams, scored], [long] * 3 + [SCORED], progress=False)
    assert any(scoring and computed for scoring, computed in seen)
    check(tiny_folder, scored, done[-1].prompt_logprobs)
    assert [o.outputs[0].token_ids for o in done] == [
        *reference(tiny_folder, streams, 60),
        *reference(tiny_folder, [scored], 12),
    ]
    assert clean(llm)


def test_choices_share_them(tiny_folder) -> None:
    llm = small(tiny_folder)
    item = prompts(4, seed=3)[3]
    (done,) = llm.generate([item], SamplingParams(n=3, seed=1, prompt_logprobs=3, max_tokens=4), progress=False)
    check(tiny_folder, item, done.prompt_logprobs)
    assert llm.engine.counters.prompt_tokens < len(item) + 2 * 17, "the prompt is computed once"


@pytest.mark.parametrize("wanted", [None, 2])
@pytest.mark.parametrize("length", [1, 16, 70])
def test_no_output_at_all(tiny_folder, length, wanted) -> None:
    """`max_tokens` 0: the prompt is computed, and that is it."""
    llm = small(tiny_folder, max_num_batched_tokens=32)
    item = [*range(length)]
    params = SamplingParams(n=2, max_tokens=0, prompt_logprobs=wanted, logprobs=1)
    (done,) = llm.generate([item], params, progress=False)
    for choice in done.outputs:
        assert (choice.text, choice.token_ids, choice.logprobs) == ("", [], [])
        assert choice.finish_reason == "length"
    if wanted is None:
        assert done.prompt_logprobs is None
    else:
        check(tiny_folder, item, done.prompt_logprobs, top=2)
    assert llm.engine.counters.generated_tokens == 0
    assert clean(llm)


# --- handoffs -------------------------------------------------------------------------------------------------------


def record(pair: Pair) -> list[FirstToken]:
    """Fills with what both workers tell the frontend of first tokens."""
    told: list[FirstToken] = []

    def wrap(step: Callable[[], StepResult], side: Side) -> Callable[[], StepResult]:
        def noted() -> StepResult:
            result = step()
            told.extend(o for o in [*side.handoffs.receiver.outputs, *result.outputs] if isinstance(o, FirstToken))
            return result

        return noted

    for side in (pair.p, pair.d):
        side.engine.step = wrap(side.engine.step, side)  # type: ignore[method-assign]
    return told


def warm(side: Side) -> None:
    """`side` has the whole prompt in its prefix cache."""
    plain = SamplingParams(temperature=0, max_tokens=1)
    side.engine.add(Sequence("w", PROMPT, plain, 0, root_hash(side.built.layout)))
    while side.engine.find("w"):
        side.step()
    side.out.clear()


@pytest.mark.parametrize("max_tokens", [12, 1, 0])
@pytest.mark.parametrize("cached", [False, True], ids=["", "cached"])
def test_a_prefiller_scores_the_prompt(tiny_folder, cached, max_tokens) -> None:
    """All of it, whatever both had of it; both report the same, of which the frontend takes the first."""
    pair = Pair(tiny_folder)
    if cached:
        warm(pair.p)
        warm(pair.d)
    told = record(pair)
    pair.ask(params=msgspec.structs.replace(SCORED, max_tokens=max_tokens), share_history=True)
    for message in pair.publications():
        pair.d.handoffs.receiver.on_publish(message, "p0")
    (release,) = pair.d.take(Release)
    pair.p.handoffs.sender.on_release(release.turn)
    assert pair.finish() == pair.text[:max_tokens]
    assert len(told) == 2
    for first in told:
        check(tiny_folder, PROMPT, first.prompt_logprobs)
    pair.check()


@pytest.mark.parametrize("arrived", [0, 1, 3])
def test_who_loses_the_prefiller_scores_the_prompt_itself(tiny_folder, arrived) -> None:
    """From the beginning, though a part of the KV has come."""
    pair = Pair(tiny_folder)
    told = record(pair)
    pair.ask(params=SCORED)
    for message in pair.publications()[:arrived]:
        pair.d.handoffs.receiver.on_publish(message, "p0")
    pair.d.handoffs.set_peers([])
    assert pair.finish() == pair.text
    assert len(told) == 2
    check(tiny_folder, PROMPT, told[1].prompt_logprobs)
    assert pair.d.engine.pool.num_held == 0


def test_a_turn_that_runs_again_after_its_first_token_brings_none(tiny_folder) -> None:
    """The client has them."""
    pair = Pair(tiny_folder)
    told = record(pair)
    sequence = Sequence("t", [*PROMPT, *pair.text[:2]], SCORED, 0, root_hash(pair.d.built.layout), prior=2)
    pair.d.engine.add(sequence)
    while pair.d.engine.find("t"):
        pair.d.step()
    assert [first.prompt_logprobs for first in told] == [None]
    assert [pair.d.out[i] for i in range(2, 12)] == pair.text[2:]
