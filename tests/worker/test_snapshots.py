"""Snapshots of recurrent state: how much a turn computes, what is kept, and that nothing is kept for ever."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from miniserve.cluster.messages import Fetch, FirstToken, Keep, Prefill, Publish, Release
from miniserve.config import ConfigError, EngineConfig
from miniserve.kv.eviction import make_order
from miniserve.kv.hashing import snapshot_names
from miniserve.kv.pages import PagePool
from miniserve.sampling_params import SamplingParams
from miniserve.worker import sizing
from miniserve.worker.build import build
from miniserve.worker.engine import Engine
from miniserve.worker.sequence import Sequence
from miniserve.worker.snapshots import Snapshots
from miniserve.worker.step import Work
from tests.support.handoff_pair import Pair, Side
from tests.support.tiny import reference
from tests.support.whole import check_pool

PAGE = 16
SIZE = 3
"""Pages of a snapshot of the tiny model."""
PARAMS = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)


def make(folder: Path, **engine) -> Engine:
    settings = {"kv_cache_memory": 2**22, "threads": 1, "dtype": "float32"}
    return build(EngineConfig(model=str(folder), **settings | engine)).engine


def run(engine: Engine, *sequences: Sequence) -> list[list[int]]:
    """The answers of turns that come together."""
    for sequence in sequences:
        engine.add(sequence)
    while engine.waiting or engine.running:
        engine.admit()
        engine.step()
    check_pool(engine.pool)
    assert engine.pool.num_held == 0
    assert engine.snapshots is not None
    assert len(engine.snapshots._free) == engine.snapshots.slots.slots
    if engine.host is not None:
        check_pool(engine.host)
    return [sequence.tokens[sequence.given :] for sequence in sequences]


def turn(name: str, tokens: list[int], conversation: str = "c", **more) -> Sequence:
    return Sequence(name, tokens, PARAMS, 0, b"root", keep=Keep(conversation, gap=5.0), **more)


def some(count: int, seed: int) -> list[int]:
    return random.Random(seed).choices(range(300), k=count)


@pytest.mark.parametrize("overlap", [False, True], ids=["", "overlap"])
@pytest.mark.parametrize("reasons", [False, True], ids=["", "reasons"])
def test_ten_turns_compute_what_is_new_and_less_than_a_page(hybrid_folder: Path, reasons: bool, overlap: bool) -> None:
    """With a template that drops `reasons`, the next prompt leaves the turn before at the end of its prompt."""
    engine = make(hybrid_folder, async_scheduling=overlap, max_num_batched_tokens=40)
    prompt, answers, prompts = some(50, 0), [], []
    for number in range(10):
        prompts.append(prompt)
        made = turn(f"t{number}", prompt)
        answers += run(engine, made)
        if number:
            new = len(prompt) - (len(prompts[-2]) if reasons else len(prompts[-2]) + 19)
            assert made.cached is not None
            assert 0 <= len(prompt) - made.cached - new < PAGE
        kept = engine.pool.snapshot_pages / SIZE
        assert 1 <= kept <= 2, "of the last turn only"
        prompt = prompt + ([] if reasons else answers[-1]) + some(13, number)
    assert answers == reference(hybrid_folder, prompts, 20)


@pytest.mark.parametrize("together", [False, True], ids=["", "together"])
def test_a_prefix_that_conversations_share_is_computed_twice_at_most(hybrid_folder: Path, together: bool) -> None:
    """The first one passes its end unaware. One beside it asks it to leave a snapshot there; a later one leaves it
    itself, for those to come."""
    engine, shared = make(hybrid_folder), some(100, 1)
    prompts = [shared + some(30, 2 + i) for i in range(4)]
    turns = [turn(f"t{i}", prompt, f"c{i}") for i, prompt in enumerate(prompts)]
    if together:
        answers = run(engine, *turns)
    else:
        answers = [answer for each in turns for answer in run(engine, each)]
    assert answers == reference(hybrid_folder, prompts, 20)
    found = [sequence.cached for sequence in turns]
    assert found == ([0, 96, 96, 96] if together else [0, 0, 96, 96])
    again = turn("t9", shared + some(5, 9), "c9")
    run(engine, again)
    assert again.cached == 96, "what one conversation has left, another one's end does not take away"


def test_a_snapshot_goes_to_host_memory_and_comes_back(hybrid_folder: Path) -> None:
    one, other = some(100, 1), some(100, 2)
    engine = make(hybrid_folder, swap_space=2**21, max_model_len=200)
    (answer,) = run(engine, turn("t0", one, "a"))
    taken = engine.pool.allocate(engine.pool.num_available, 1.0)  # everything goes
    engine.pool.release(taken, Keep(), 1.0)
    assert engine.pool.num_cached == 0
    assert engine.host.num_used == 119 // PAGE + 2 * SIZE
    after = turn("t1", one + answer + other[:20], "a")
    assert run(engine, after) == reference(hybrid_folder, [one + answer + other[:20]], 20)
    assert after.cached == 119 // PAGE * PAGE
    assert engine.host.restored == 119 // PAGE + SIZE


def test_a_snapshot_that_is_not_whole_is_not_used(hybrid_folder: Path) -> None:
    engine, prompt = make(hybrid_folder), some(100, 1)
    first = turn("t0", prompt)
    run(engine, first)
    name = snapshot_names(first.hashes(PAGE)[5], SIZE)[-1]
    engine.pool._drop([engine.pool._page_of[name]])
    again = turn("t1", [*prompt, 7, 8, 9])
    assert run(engine, again) == reference(hybrid_folder, [[*prompt, 7, 8, 9]], 20)
    assert again.cached == 0
    assert run(engine, turn("t2", [*prompt, 7, 8, 9, 10])) == reference(hybrid_folder, [[*prompt, 7, 8, 9, 10]], 20)


@pytest.mark.parametrize("pages", [16, 20, 30])
def test_too_little_room_for_snapshots(hybrid_folder: Path, pages: int) -> None:
    """They give way to tokens; turns that do not fit together take turns."""
    page_bytes = make(hybrid_folder).snapshots.slots._pool.shape[1]
    engine = make(hybrid_folder, kv_cache_memory=(pages + SIZE) * page_bytes, max_model_len=pages * PAGE)
    prompts = [some(60 + 7 * i, i) for i in range(6)]
    turns = [turn(f"t{i}", prompt, f"c{i}") for i, prompt in enumerate(prompts)]
    assert run(engine, *turns) == reference(hybrid_folder, prompts, 20)


def test_no_more_sequences_run_than_slots_fit(hybrid_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page_bytes = make(hybrid_folder).snapshots.slots._pool.shape[1]
    monkeypatch.setattr(sizing, "memory_available", lambda: 8 * 3 * SIZE * page_bytes + 2**31)
    monkeypatch.setattr(sizing, "CPU_RUNTIME_BYTES", 0)
    engine = make(hybrid_folder, gpu_memory_utilization=1.0, max_num_seqs=2)
    assert (engine.max_num_seqs, engine.snapshots.slots.slots) == (2, 2)
    monkeypatch.setattr(sizing, "memory_available", lambda: 8 * 3 * SIZE * page_bytes)
    engine = make(hybrid_folder, gpu_memory_utilization=1.0)
    assert (engine.max_num_seqs, engine.snapshots.slots.slots) == (3, 3)
    prompts = [some(20 + 7 * i, i) for i in range(6)]
    turns = [turn(f"t{i}", prompt, f"c{i}") for i, prompt in enumerate(prompts)]
    assert run(engine, *turns) == reference(hybrid_folder, prompts, 20)


def test_without_a_prefix_cache_there_are_none(hybrid_folder: Path) -> None:
    engine, prompt = make(hybrid_folder, enable_prefix_caching=False), some(100, 1)
    assert run(engine, turn("t0", prompt)) == run(engine, turn("t1", prompt)) == reference(hybrid_folder, [prompt], 20)
    assert engine.pool.snapshot_pages == engine.snapshots.saved == 0


def test_what_the_states_of_all_sequences_take_is_said(hybrid_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizing, "memory_available", lambda: 2**29)
    with pytest.raises(ConfigError, match=r"MiB recurrent state = .* or a smaller --max-num-seqs or"):
        make(hybrid_folder, kv_cache_memory=None)


# --- handoffs -------------------------------------------------------------------------------------------------------


@pytest.fixture
def pair(hybrid_folder: Path) -> Pair:
    return Pair(hybrid_folder)


def test_the_state_comes_with_the_commit(pair: Pair) -> None:
    """Of 100 tokens 96 and the state after them are handed over, and the first token; D computes the other four."""
    pair.ask()
    messages = pair.publications()
    assert [len(message.pages) for message in messages] == [2, 2, 2, 0]
    assert [len(message.state) for message in messages] == [0, 0, 0, SIZE]
    for message in messages:
        pair.d.handoffs.receiver.on_publish(message, "p0")
    assert pair.d.take(Release)
    steps = pair.d.engine.counters.prompt_tokens
    assert pair.finish() == pair.text
    assert pair.d.engine.counters.prompt_tokens - steps == 100 - 96 + 1
    pair.p.handoffs.sender.on_release("t")
    pair.check()
    for side in (pair.p, pair.d):
        assert side.engine.pool.snapshot_pages == SIZE, "both can go on from there"


@pytest.mark.parametrize("published", range(5))
@pytest.mark.parametrize("how", ["death", "abort"])
def test_losing_p_or_d_at_any_moment(pair: Pair, published: int, how: str) -> None:
    pair.ask()
    messages = pair.publications()
    for message in messages[:published]:
        pair.d.handoffs.receiver.on_publish(message, "p0")
    if how == "death":
        pair.d.handoffs.set_peers([])
        assert pair.finish() == pair.text
    else:
        pair.d.handoffs.receiver.abort("t")
        pair.d.engine.abort("t")
    pair.p.handoffs.sender.on_release("t")
    pair.check()


@pytest.mark.parametrize("bad", ["hashes", "no state", "half a state", "late"])
def test_what_does_not_fit_is_computed(pair: Pair, bad: str) -> None:
    import msgspec

    pair.ask()
    *pages, commit = pair.publications()
    changes = {
        "hashes": {},
        "no state": {"state": []},
        "half a state": {"state": commit.state[:1]},
        "late": {"deadline": pair.now - 1},
    }
    if bad == "hashes":
        pages[1] = msgspec.structs.replace(pages[1], hashes=[b"x" * 16] * 2)
    for message in (*pages, msgspec.structs.replace(commit, **changes[bad])):
        pair.d.handoffs.receiver.on_publish(message, "p0")
    assert pair.finish() == pair.text
    pair.p.handoffs.sender.on_release("t")
    pair.check()


def test_a_prefiller_that_finds_the_whole_prompt_hands_its_snapshot_over(pair: Pair) -> None:
    for _ in range(2):
        pair.ask()
        messages = pair.publications()
        for message in messages:
            pair.d.handoffs.receiver.on_publish(message, "p0")
        assert pair.finish() == pair.text
        pair.p.handoffs.sender.on_release("t")
        pair.d.engine.reset()
        pair.d.out.clear()
        pair.p.out.clear()
    assert [len(message.state) for message in messages] == [SIZE]
    assert isinstance(messages[0].commit, FirstToken)
    pair.check()


def test_history_comes_with_its_snapshot(pair: Pair) -> None:
    """A new home asks the old one for what it holds."""
    prompt, old = pair.d.prompt, pair.p
    old.engine.add(Sequence("old", prompt[:80], PARAMS, 0, old.sequence().root))
    while old.engine.find("old"):
        old.step()
    old.out.clear()
    sequence = pair.d.sequence(history_at="p0")
    pair.d.engine.add(sequence)
    pair.d.step()
    (fetch,) = pair.d.sent
    pair.d.sent.clear()
    old.handoffs.sender.on_fetch(fetch, "d0")
    (answer,) = old.take(Publish)
    assert (len(answer.pages), len(answer.state)) == (5, SIZE)
    pair.d.handoffs.receiver.on_publish(answer, "p0")
    assert sequence.computed == sequence.cached == 80
    assert pair.finish() == pair.text
    old.handoffs.sender.on_release("t")
    pair.check()


def side(folder: Path, name: str, pages: int, **engine) -> Side:
    """A worker whose pool has so many pages."""
    page_bytes = make(folder).snapshots.slots._pool.shape[1]
    return Side(name, folder, lambda: 100.0, kv_cache_memory=pages * page_bytes, max_model_len=112, **engine)


def test_a_pool_that_holds_one_snapshot_less_is_no_reason_to_wait_for_ever(hybrid_folder: Path) -> None:
    """Seven pages of tokens, the snapshot that was found and the one that is to come are more than the pool has."""
    d, p = side(hybrid_folder, "d0", 7 + SIZE), side(hybrid_folder, "p0", 7 + SIZE)
    d.handoffs.set_peers([p.peer])
    d.engine.add(Sequence("old", d.prompt[:80], SamplingParams(max_tokens=2), 0, d.sequence().root))
    while d.engine.find("old"):
        d.step()
    sequence = d.sequence(prefill_at="p0")
    d.engine.add(sequence)
    d.step()
    assert d.take(Prefill)
    assert sequence.computed == 0, "what was found was given up"


def test_a_prefiller_keeps_room_for_the_states_that_it_hands_over(hybrid_folder: Path) -> None:
    """Two prompts fill the pool up to two pages: the second one waits until the first has been fetched."""
    p, d = side(hybrid_folder, "p0", 16), side(hybrid_folder, "d0", 16)
    p.handoffs.set_peers([d.peer])
    for turn, prompt in (("a", some(100, 1)), ("b", some(100, 2))):
        p.handoffs.sender.on_prefill(Prefill(turn, prompt, PARAMS, 0), "d0")
    commits = []
    for _ in range(30):
        p.step()
        done = [message for message in p.take(Publish) if message.commit]
        for message in done:
            p.handoffs.sender.on_release(message.turn)
        commits += done
    assert [len(message.state) for message in commits] == [SIZE, SIZE]
    check_pool(p.engine.pool)
    assert p.engine.pool.num_held == 0


def test_history_comes_first_and_then_the_state_of_the_whole_prompt(pair: Pair) -> None:
    """A new home that asks for both has one place for a state."""
    old = pair.p
    old.engine.add(Sequence("old", pair.d.prompt[:80], PARAMS, 0, old.sequence().root))
    while old.engine.find("old"):
        old.step()
    old.out.clear()
    sequence = pair.d.sequence(history_at="p0", prefill_at="p0")
    pair.d.engine.add(sequence)
    pair.d.step()
    (fetch,) = pair.d.take(Fetch)
    old.handoffs.sender.on_fetch(fetch, "d0")
    (answer,) = old.take(Publish)
    pair.d.handoffs.receiver.on_publish(answer, "p0")
    assert sequence.computed == 80
    old.handoffs.sender.on_release("t")
    (prefill,) = pair.d.take(Prefill)
    assert prefill.have == 80
    old.handoffs.sender.on_prefill(prefill, "d0")
    for message in pair.publications():
        pair.d.handoffs.receiver.on_publish(message, "p0")
    assert sequence.computed == 96
    assert pair.d.take(Release)
    assert pair.finish() == pair.text
    old.handoffs.sender.on_release("t")
    pair.check()


def test_a_turn_that_ends_just_before_a_step_too_many_keeps_its_last_snapshot(hybrid_folder: Path) -> None:
    """With overlap the token behind a stop token is computed too: that state is not the turn's."""
    engine = make(hybrid_folder, async_scheduling=True)
    for seed in range(100):
        prompt = some(50, seed)
        (answer,) = run(engine, Sequence("t", prompt, SamplingParams(temperature=0, max_tokens=30), 0, b"other"))
        if len(answer) == 30 and answer.index(answer[-1]) == 29:
            break
    params = SamplingParams(temperature=0, max_tokens=40, stop_token_ids=[answer[-1]])
    assert run(engine, Sequence("t0", prompt, params, 0, b"root", keep=Keep("c", gap=5.0))) == [answer]
    after = turn("t1", [*prompt, *answer, 5, 6, 7], "c")
    run(engine, after)
    assert after.cached == 64


class Late:
    """Slots of a device whose copies are complete when they are waited for."""

    slots, pages = 1, 2

    def __init__(self) -> None:
        self.waited = False

    def clear(self, slot: int) -> None: ...

    def save(self, slot: int, pages: list[int]) -> Late:
        return self

    def wait(self) -> None:
        self.waited = True


def test_a_snapshot_has_a_name_when_its_copy_is_complete() -> None:
    """The step is over, but the copy was launched behind it: others must not read the pages before it is made."""
    slots, pool = Late(), PagePool(10, make_order("expected"))
    snapshots = Snapshots(slots, pool, None, 4)
    sequence = Sequence("t", [1] * 6, PARAMS, 0, b"root")
    sequence.pages = pool.allocate(2, 0.0)
    snapshots.begin(sequence, [], [], 0, 0.0)
    snapshots.launched(Work.next(sequence, sequence.next_piece), 0.0)
    assert not slots.waited
    sequence.computed = 4
    snapshots.register(sequence, 0.0)
    assert slots.waited
    assert pool.snapshot_pages == 2
