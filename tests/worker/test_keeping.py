"""KV between turns: conversations that do not fit all at once come back, and find what the engine kept of theirs."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from miniserve.cluster.messages import Keep
from miniserve.config import ConfigError, EngineConfig
from miniserve.kv.eviction import UNKNOWN
from miniserve.sampling_params import SamplingParams
from miniserve.worker import sizing
from miniserve.worker.build import Built, build
from miniserve.worker.engine import Engine
from miniserve.worker.sequence import Sequence
from tests.support.tiny import prompts, reference
from tests.support.whole import check_pool

PAGE_BYTES = 2 * 2 * 16 * 2 * 32 * 4
"""Of the tiny model in fp32: layers, keys and values, tokens, heads, their size, bytes."""
ANSWER = 20


class Clock:
    """Time stands still unless a test moves it."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def make(folder: Path, pages: int, slots: int = 0, clock: Clock | None = None, **engine) -> Engine:
    """An engine with a pool of `pages` and host memory for `slots`."""
    sizes = {"kv_cache_memory": pages * PAGE_BYTES, "swap_space": slots * PAGE_BYTES, "max_model_len": 256}
    engine = built(folder, **sizes, **engine).engine
    assert engine.pool.num_pages == pages
    engine.clock = clock or Clock()
    return engine


def built(folder: Path, **engine) -> Built:
    return build(EngineConfig(model=str(folder), threads=1, dtype="float32", **engine))


def sequence(name: str, tokens: list[int], keep: Keep, **more) -> Sequence:
    params = SamplingParams(temperature=0, max_tokens=ANSWER, ignore_eos=True)
    return Sequence(name, tokens, params, 0, b"root", keep=keep, **more)


def run(engine: Engine, sequences: list[Sequence]) -> list[list[int]]:
    """Answers of turns that come together."""
    for turn in sequences:
        engine.add(turn)
    while engine.waiting or engine.running:
        engine.admit()
        engine.step()
        assert engine.pool.num_free + engine.pool.num_cached + engine.pool.num_held == engine.pool.num_pages
    check_pool(engine.pool)
    assert engine.pool.num_held == 0
    if engine.host is not None:
        check_pool(engine.host)
    return [turn.tokens[turn.given :] for turn in sequences]


def turn(engine: Engine, conversation: str, tokens: list[int], keep: Keep) -> Sequence:
    """One turn, alone."""
    one = sequence(f"{conversation}.{len(tokens)}", tokens, keep)
    run(engine, [one])
    return one


@pytest.mark.parametrize("order", ["expected", "lru"])
@pytest.mark.parametrize("together", [1, 4])
def test_twice_as_many_conversations_as_fit(tiny_folder: Path, order: str, together: int) -> None:
    """8 conversations of up to 9 pages in a pool of 36, three turns each, in turn: all history comes back by copy."""
    clock = Clock()
    engine = make(tiny_folder, 36, slots=80, kv_eviction=order, max_num_batched_tokens=64, clock=clock)
    histories = prompts(8, seed=21, shortest=60, longest=80)
    assert engine.host is not None
    assert {pool._order.lru for pool in (engine.pool, engine.host)} == {order == "lru"}
    for number in range(3):
        for start in range(0, 8, together):
            some = range(start, start + together)
            turns = [
                sequence(f"{i}.{number}", histories[i], Keep(str(i), gap=10.0, chance=0.9, page_seconds=0.01))
                for i in some
            ]
            answers = run(engine, turns)
            assert answers == reference(tiny_folder, [histories[i] for i in some], ANSWER)
            for i, one, answer in zip(some, turns, answers, strict=True):
                if number:  # all but the new message, and what it shares a page with
                    known = len(histories[i]) - 4 - 1
                    assert one.cached == known // 16 * 16
                histories[i] = [*histories[i], *answer, *[(i + number) % 256] * 4]
            clock.now += together
    assert engine.host.restored > 24
    assert engine.host.offloaded > 36
    assert engine.counters.prefix_hits > engine.counters.prefix_queries / 2


@pytest.mark.parametrize(("order", "found"), [("expected", 64), ("lru", 0)])
def test_conversations_due_soon_stay_and_the_others_go(tiny_folder: Path, order: str, found: int) -> None:
    """4 conversations with gaps of seconds, then 4 with gaps of hours; each has 5 pages, and the pool 28."""
    clock = Clock()
    engine = make(tiny_folder, 28, clock=clock, kv_eviction=order)
    items = prompts(8, seed=22, shortest=64, longest=64)
    for i, item in enumerate(items):
        turn(engine, str(i), item, Keep(str(i), gap=8.0 if i < 4 else 9000.0, page_seconds=0.01))
        clock.now += 1
    again = [turn(engine, str(i), [*items[i], 1, 2, 3], Keep(str(i), gap=8.0, page_seconds=0.01)) for i in range(4)]
    assert [one.cached for one in again] == [found] * 4


def test_a_system_prompt_stays_with_the_last_conversation_that_needs_it(tiny_folder: Path) -> None:
    engine = make(tiny_folder, 17)
    system, one, other, long = prompts(4, seed=29, shortest=64, longest=64)
    turn(engine, "soon", [*system, *one], Keep("soon", gap=8.0))
    turn(engine, "later", [*system, *other], Keep("later", gap=9000.0))
    assert engine.pool.num_cached == 14  # 9 each, 4 of them shared
    turn(engine, "long", [*long, *[5] * 48], Keep("long", gap=8.0))  # takes 6: the 5 own ones of the second, and 1
    assert turn(engine, "again", [*system, *one, 1, 2, 3], Keep("soon", gap=8.0)).cached == 128


def test_a_conversation_is_late_by_the_clock(tiny_folder: Path) -> None:
    """And its gap begins with the end of its turn."""
    clock = Clock()
    engine = make(tiny_folder, 16, clock=clock)
    one, other, long = prompts(3, seed=30, shortest=64, longest=64)
    slow = sequence("slow", one, Keep("slow", gap=100.0, chance=0.9))
    engine.add(slow)
    engine.admit()
    while len(slow.tokens) < 64 + ANSWER - 1:
        engine.step()
    clock.now += 1000
    engine.step()
    turn(engine, "quick", other, Keep("quick", gap=5.0, chance=0.9))
    clock.now += 70  # one is due in 30 s, the other is 65 s late
    turn(engine, "long", [*long, *[5] * 96], Keep("long", gap=8.0))  # 10 pages at once, 6 of which are free
    assert turn(engine, "again", [*one, 1, 2, 3], Keep("slow", gap=100.0)).cached == 64


def test_a_waiting_turn_keeps_what_it_will_find(tiny_folder: Path) -> None:
    """It has no room yet, and the one that runs takes more pages: those of another conversation, though due sooner."""
    engine = make(tiny_folder, 16)
    known, other, long = prompts(3, seed=23, shortest=64, longest=64)
    late = Keep("late", gap=9000.0, page_seconds=0.01)
    turn(engine, "late", known, late)
    turn(engine, "other", other, Keep("other", gap=900.0, page_seconds=0.01))
    assert (engine.pool.num_free, engine.pool.num_cached) == (6, 10)
    running = sequence("long", [*long, *[5] * 32], Keep("long", gap=5.0))  # 6 pages, and 2 more for its answer
    waiting = sequence("waiting", [*known, *[7] * 110], late)
    engine.add(running)
    engine.add(waiting)
    engine.admit()
    assert (engine.running, list(engine.waiting)) == ([running], [waiting])
    run(engine, [])
    assert waiting.cached == 64
    assert waiting.tokens[waiting.given :] == reference(tiny_folder, [[*known, *[7] * 110]], ANSWER)[0]


def test_a_preempted_turn_keeps_its_pages_before_all_others(tiny_folder: Path) -> None:
    engine = make(tiny_folder, 16)
    one, other = prompts(2, seed=31, shortest=64, longest=64)
    turn(engine, "other", other, Keep("other", gap=60.0))
    preempted = sequence("one", one, Keep("one", gap=9000.0))
    engine.add(preempted)
    engine.admit()
    engine.step()
    engine._preempt(preempted)
    engine.pool.release(engine.pool.allocate(12, engine.clock()), UNKNOWN, engine.clock())  # all but its 4 pages
    engine.admit()
    assert preempted.computed == 64
    run(engine, [])


def test_what_one_turn_has_restored_the_next_finds_in_the_pool(tiny_folder: Path) -> None:
    engine = make(tiny_folder, 16, slots=16)
    one, other = prompts(2, seed=32, shortest=70, longest=70)
    turn(engine, "one", one, Keep("one", gap=50.0))
    turn(engine, "other", [*other, *[3] * 170], Keep("other", gap=5.0))
    for branch in (1, 2):
        engine.add(sequence(f"branch {branch}", [*one[:64], *[branch] * 20], Keep("one", gap=50.0)))
    engine.admit()
    assert [branch.computed for branch in engine.running] == [64, 64]
    assert engine.host is not None
    assert engine.host.restored == 4
    run(engine, [])


def test_what_can_be_restored_is_not_waited_for(tiny_folder: Path) -> None:
    """Another turn computes the same pages, since it thinks that is quicker."""
    engine = make(tiny_folder, 16, slots=16)
    one, other = prompts(2, seed=32, shortest=70, longest=70)
    turn(engine, "one", one, Keep("one", gap=50.0))
    turn(engine, "other", [*other, *[3] * 170], Keep("other", gap=5.0))
    engine.add(sequence("quick", [*one[:64], *[1] * 20], Keep("one", page_seconds=1e-12)))
    engine.add(sequence("dear", [*one[:64], *[2] * 20], Keep("one", page_seconds=10.0)))
    engine.admit()
    assert [turn.computed for turn in engine.running] == [0, 64]
    run(engine, [])


def test_admission_does_not_push_out_what_it_restores(tiny_folder: Path) -> None:
    """Host memory is full of one history; its pages on the device are taken from another one, which moves there."""
    engine = make(tiny_folder, 16, slots=5)
    one, other = prompts(2, seed=24, shortest=70, longest=70)
    turn(engine, "one", one, Keep("one", gap=9000.0))
    turn(engine, "other", [*other, *[3] * 170], Keep("other", gap=5.0))
    assert engine.host is not None
    assert engine.host.num_used == 5
    again = turn(engine, "one again", [*one, 1, 2, 3, *[6] * 120], Keep("one", gap=9000.0))
    assert again.cached == 64
    assert engine.host.restored == 4


def test_history_is_computed_where_that_is_quicker_than_a_copy(tiny_folder: Path) -> None:
    engine = make(tiny_folder, 16, slots=32)
    one, other = prompts(2, seed=25, shortest=70, longest=70)
    turn(engine, "one", one, Keep("one"))
    for page_seconds, found in ((1e-12, 0), (10.0, 64), (0.0, 64)):
        turn(engine, f"other {page_seconds}", [*other, *[3] * 170], Keep("other"))
        again = turn(engine, f"one {page_seconds}", one, Keep("one", page_seconds=page_seconds))
        assert again.cached == found


def test_who_receives_kv_restores_its_own_first(tiny_folder: Path) -> None:
    engine = make(tiny_folder, 16, slots=16)
    one, other = prompts(2, seed=26, shortest=70, longest=70)
    turn(engine, "one", one, Keep("one", gap=50.0))
    turn(engine, "other", [*other, *[3] * 170], Keep("other", gap=5.0))
    again = sequence("again", [*one, *[1] * 30], Keep("one", gap=50.0), prefill_at="p0")
    engine.add(again)
    assert engine.admit() == [again]
    assert again.computed == 64
    engine.resume(again)
    run(engine, [])
    assert again.tokens[again.given :] == reference(tiny_folder, [[*one, *[1] * 30]], ANSWER)[0]


@pytest.mark.parametrize("caching", [True, False])
def test_preemption_and_aborts_with_host_memory(tiny_folder: Path, caching: bool) -> None:
    """More running sequences than the pool can hold, some of them aborted: the same text, and nothing is left."""
    clock = Clock()
    engine = make(tiny_folder, 20, slots=12, enable_prefix_caching=caching, max_num_batched_tokens=48, clock=clock)
    assert (engine.host is not None) == caching
    items = prompts(10, seed=37, shortest=20, longest=90)
    texts = reference(tiny_folder, items, ANSWER)
    pick = random.Random(4)
    for number in range(3):
        turns = [sequence(f"{i}.{number}", item, Keep(str(i % 4), gap=3.0)) for i, item in enumerate(items)]
        for one in turns:
            engine.add(one)
        doomed = {f"{i}.{number}" for i in pick.sample(range(10), 3)}
        gone = set(doomed)
        while engine.waiting or engine.running:
            engine.admit()
            engine.step()
            clock.now += 0.5
            if doomed and pick.random() < 0.3:
                engine.abort(doomed.pop())
        for one, text in zip(turns, texts, strict=True):
            answer = one.tokens[one.given :]
            assert answer == text[: len(answer)]
            assert len(answer) == ANSWER or one.turn in gone
    run(engine, [])
    assert engine.counters.preemptions > 0
    assert engine.host is None or engine.host.restored > 0


def test_a_reset_forgets_host_memory_too(tiny_folder: Path) -> None:
    engine = make(tiny_folder, 16, slots=16)
    one, other = prompts(2, seed=28, shortest=70, longest=70)
    turn(engine, "one", one, Keep("one", gap=50.0))
    turn(engine, "other", [*other, *[3] * 170], Keep("other", gap=5.0))
    assert engine.host is not None
    assert engine.host.num_used > 0
    engine.reset()
    assert (engine.host.num_used, engine.host.offloaded) == (0, 0)
    assert turn(engine, "again", one, Keep("one")).cached == 0


def test_the_banner_tells_of_the_swap_space(tiny_folder: Path) -> None:
    note = built(tiny_folder, kv_cache_memory=2**22, swap_space=2**20).facts.kv_note
    assert note.endswith("; 64 pages = 1MiB of swap space")
    assert "swap" not in built(tiny_folder, kv_cache_memory=2**22).facts.kv_note
    assert "- 1GiB swap space =" in built(tiny_folder, swap_space=2**30).facts.kv_note


def test_swap_space_comes_out_of_the_same_memory(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sizing, "memory_available", lambda: (sizing.CPU_RUNTIME_BYTES + 2**25) * 10 // 9)
    without, with_it = (
        built(tiny_folder, swap_space=size, max_model_len=64).engine.pool.num_pages for size in (0, 2**23)
    )
    assert without - with_it == 2**23 // PAGE_BYTES


def test_a_swap_space_that_holds_nothing_says_how_to_write_one(tiny_folder: Path) -> None:
    """vLLM counts it in GiB."""
    with pytest.raises(ConfigError, match=r"--swap-space 4 is 4 bytes, less than one page .* Write it like 4GiB"):
        built(tiny_folder, swap_space=4)
