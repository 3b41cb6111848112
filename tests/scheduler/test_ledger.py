"""The ledger of pages: what turns reserve and what idle conversations hold, over made-up workers."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miniserve.cluster.messages import Report, Run
from miniserve.sampling_params import SamplingParams
from miniserve.scheduler.baselines import POLICIES
from miniserve.scheduler.queue import Group
from miniserve.scheduler.scheduler import Scheduler
from miniserve.scheduler.turns import Turn
from tests.support.scheduling import (
    STATS,
    delivered,
    end,
    join,
    report,
    returning,
    run_of,
    scheduler,
    sent,
    submit,
)


def test_a_queued_turn_that_is_cancelled_leaves_the_ledger_as_it_was() -> None:
    made = scheduler("d0", max_turns=1)
    _, run = run_of(submit(made, "a", [1] * 40, key="c"))
    end(made, "d0", run.turn)
    before = made.workers["d0"].resident
    assert before == 3
    submit(made, "b", [2] * 40)
    submit(made, "c", [1] * 60, key="c")
    assert made.queued == 1
    made.cancel("c", 0.0)
    assert made.workers["d0"].resident == before


def test_a_turn_that_generates_more_than_expected_takes_its_pages_in_the_ledger_too() -> None:
    made = scheduler("d0")
    _, run = run_of(submit(made, "t", [1] * 40))
    view = made.workers["d0"]
    assert view.reserved == 4, "40 tokens and 16 of output"
    made.turns["t"].params = SamplingParams()
    for i in range(60):
        report(made, "d0", run.turn, i, 7)
    assert view.reserved == 7, "100 tokens and the next one"
    end_commands = report(made, "d0", run.turn, 60, 7, finish="stop")
    assert delivered(end_commands) == [("t", [7])]
    assert (view.reserved, view.resident) == (0, 7)


def test_a_turn_gets_the_pages_that_its_conversation_has_needed() -> None:
    made = scheduler("d0")
    tokens = [1] * 40
    for n in range(3):
        _, run = run_of(made.submit(f"t{n}", tokens, SamplingParams(max_tokens=None), 0, "c", "", n))
        for i in range(200):
            report(made, "d0", run.turn, i, 7, n + 0.5, finish="stop" if i == 199 else None, cached_tokens=i and None)
        tokens = tokens + [7] * 200
    made.submit("t3", tokens, SamplingParams(max_tokens=None), 0, "c", "", 9)
    assert made.turns["t3"].output == 200
    made.submit("new", [2] * 40, SamplingParams(max_tokens=10), 0, "", "", 9)
    assert made.turns["new"].output == 10


def test_what_a_prefiller_lends_is_given_back_once() -> None:
    made = scheduler("p0", "d0")
    _, run = run_of(submit(made, "t", [1] * 40))
    assert made.workers["p0"].reserved == 3
    report(made, "p0", run.turn, 0, 7, cached_tokens=0)
    assert made.workers["p0"].reserved == 0
    _, run = run_of(submit(made, "u", [2] * 40))
    made.worker_down("p0", returns=True)
    join(made, "p0", 2)
    report(made, "d0", run.turn, 0, 7, cached_tokens=0)
    assert made.workers["p0"].reserved == 0, "the new one has lent nothing"


def test_a_conversation_that_is_late_keeps_no_room() -> None:
    made = scheduler("d0", policy="observe", max_queued=9)
    _, run = run_of(submit(made, "a1", [1] * 800, key="a"))
    end(made, "d0", run.turn, 1.0)
    run_of(submit(made, "b1", [2] * 16, key="b", now=1.0))
    assert sent(submit(made, "c1", [3] * 1000, key="c", now=1.1), Run) == []
    assert made.on_tick(1.5) == []
    ((_, waited),) = sent(made.on_tick(2.5), Run)
    assert waited.turn == "c1.1"
    assert made.workers["d0"].wanted == 0
    assert made.workers["d0"].resident == 51, "the pages are still there, but not counted on"
    assert not made._ledger.late


def test_a_conversation_that_came_back_in_time_is_expected_anew() -> None:
    """Gaps of 10 s: late 31 s after the end of its last turn, not of the turn before."""
    made = scheduler("d0", policy="observe", max_turns=9)
    last = returning(made, "a", [1] * 160, gap=10.0)
    view = made.workers["d0"]
    assert view.wanted == 5.5, "11 pages; no conversation has gone on after three turns yet"
    _, run = run_of(submit(made, "a4", [1] * 176, key="a", now=last + 10))
    assert view.wanted == 0, "it runs"
    report(made, "d0", run.turn, 0, 5, last + 20, finish="stop", cached_tokens=0)
    for seconds, expected in ((20, True), (32, True), (50.9, True), (51.1, False)):
        made.on_tick(last + seconds)
        assert (view.wanted > 0) == expected, seconds
    assert view.resident == 12


def test_an_expectation_ends_with_its_worker_and_with_its_conversation() -> None:
    made = scheduler("d0", "d1", policy="observe")
    homes = []
    for n in range(4):
        home, run = run_of(submit(made, f"t{n}", [n + 1] * 400, key=f"k{n}"))
        end(made, home, run.turn)
        homes.append(home)
    assert set(homes) == {"d0", "d1"}
    assert all(made.workers[name].wanted > 0 for name in ("d0", "d1"))
    made.worker_down("d0", returns=True)
    join(made, "d0", 2)
    assert made.workers["d0"].wanted == 0
    made.on_tick(1e9)
    assert len(made.conversations) == 0
    assert [(w.wanted, w.resident) for w in made.workers.values()] == [(0, 0), (0, 0)]


def test_an_expectation_begins_anew_after_a_turn_was_cancelled_in_the_queue() -> None:
    made = scheduler("d0", policy="observe", max_turns=1, max_queued=100)
    for n in range(4):  # gaps of 10 s, the last end at 34
        _, run = run_of(submit(made, f"t{n}", [1] * 40, key="a", now=11.0 * n))
        report(made, "d0", run.turn, 0, 5, 11.0 * n + 1, finish="stop", cached_tokens=0)
    run_of(submit(made, "blocker", [2] * 40, key="b", now=60.0))
    assert sent(submit(made, "t9", [1] * 40, key="a", now=61.0), Run) == []
    made.cancel("t9", 62.0)
    assert made.conversations.get("a").wanted > 0
    made.on_tick(70.0)  # past 34 + 3 x 10 + 1
    assert made.conversations.get("a").wanted > 0
    made.on_tick(94.0)
    assert made.conversations.get("a").wanted == 0


def check_wanted(made: Scheduler, policy: str) -> None:
    """What a worker expects is the sum over its idle conversations, and no more than they hold."""
    here = dict.fromkeys(made.workers, 0.0)
    for conversation in made.conversations:
        assert 0 <= conversation.wanted <= conversation.resident
        assert not (conversation.active and conversation.resident), "its turns hold what they have reserved"
        if conversation.home:
            here[conversation.home] += conversation.wanted
    for name, view in made.workers.items():
        assert view.wanted == pytest.approx(here[name], abs=1e-6)
        assert view.reserved >= 0
    assert all(turn.conversation.home or policy == "observe" for _, turn in made._queue.line(Group.NEWCOMERS))


@pytest.mark.parametrize("policy", POLICIES)
@given(seed=st.integers(0, 2**32))
@settings(max_examples=40, deadline=None)
def test_the_ledger_returns_to_zero(policy: str, seed: int) -> None:
    """Turns, forks, moves, cancels, deaths and long silences in any order."""
    pick, now = random.Random(seed), 0.0
    workers = pick.choice([("d0",), ("d0", "d1"), ("p0", "d0"), ("p0", "d0", "d1")])
    made = scheduler(*workers, policy=policy, max_turns=pick.choice([1, 3, 9]), max_queued=10**6)
    made.conversations._capacity = pick.choice([3, 1000])
    epochs = dict.fromkeys(workers, 1)
    number = 0

    def running() -> list[Turn]:
        return [turn for turn in made.turns.values() if turn.run]

    def step(turn: Turn) -> None:
        finish = pick.choice(["stop", None])
        report(made, turn.home, turn.run, turn.delivered, 5, now, finish=finish, cached_tokens=0)

    def stop() -> None:
        for name, view in made.workers.items():
            if view.leaving:
                made.on_report(name, Report([], [], STATS, stopped=[*view.leaving]), now)

    for _ in range(120):
        now += pick.choice([0.0, 0.1, 1.0, 20.0])
        if pick.random() < 0.5:
            stop()
        what = pick.random()
        if what < 0.4:
            number += 1
            tokens = [pick.randint(1, 3)] * pick.choice([16, 40, 200, 700])
            submit(made, f"t{number}", tokens + [number] * pick.choice([0, 20]), pick.choice(["", "a", "b", "c"]), now)
        elif what < 0.75 and running():
            step(pick.choice(running()))
        elif what < 0.85 and len(made.turns):
            made.cancel(pick.choice([*made.turns]), now)
        elif what < 0.88:
            name = pick.choice(workers)
            made.worker_down(name, returns=True, now=now)
            epochs[name] += 1
            join(made, name, epochs[name], now)
        elif what < 0.9:
            made.on_tick(now + pick.choice([0, 5000]))
        check_wanted(made, policy)
    for _ in range(10_000):
        if not len(made.turns):
            break
        now += 1.0
        stop()
        assert running(), "a turn waits though none runs"
        step(running()[0])
        check_wanted(made, policy)
    assert (len(made.turns), made.queued) == (0, 0)
    made.on_tick(now + 3000)
    assert all(view.wanted == pytest.approx(0, abs=1e-6) for view in made.workers.values())
    made.on_tick(now + 1e6)
    assert [(view.reserved, view.turns, view.resident) for view in made.workers.values()] == [(0, 0, 0)] * len(workers)
    assert (len(made.conversations), made._ledger.late) == (0, [])
