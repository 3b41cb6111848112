"""In which order turns that wait are placed, over made-up workers."""

from __future__ import annotations

import random
from collections.abc import Callable, Set
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from miniserve.cluster.messages import Run, StepTime
from miniserve.sampling_params import SamplingParams
from miniserve.scheduler.baselines import POLICIES
from miniserve.scheduler.conversation import Conversation, Said
from miniserve.scheduler.queue import Group, WaitingQueue
from miniserve.scheduler.scheduler import QueueFull, Scheduler
from miniserve.scheduler.turns import Command, Turn
from tests.support.often import often
from tests.support.plain_queue import PlainQueue
from tests.support.scheduling import (
    end,
    join,
    report,
    report_steps,
    returning,
    run_of,
    scheduler,
    sent,
    submit,
)


def waiting(id: str, home: str | None, beside: Turn | None = None, group: str = "") -> Turn:
    """A turn of a conversation of its own, or of the same conversation as `beside`."""
    conversation = beside.conversation if beside else Conversation(id, group=group, home=home)
    conversation.active += 1
    return Turn(id, [1], SamplingParams(), 0, conversation, [], 0, 0.0, None, 1, 1)


class Served:
    """A queue over d0 and d1, of which the `full` ones take no turn."""

    def __init__(self, has_patience: Callable[[Turn, float], bool]) -> None:
        self.full: set[str] = set()
        self.tried: list[str] = []
        self.queue = WaitingQueue(has_patience, self.fits, lambda worker: 0.0, set())

    def fits(self, turn: Turn) -> bool:
        return turn.conversation.home not in self.full

    def place(self, turn: Turn, open_workers: Set[str]) -> bool:
        self.tried.append(turn.id)
        homes = [turn.conversation.home] if turn.conversation.home else ["d0", "d1"]
        free = [name for name in homes if name in open_workers and name not in self.full]
        turn.conversation.home = free[0] if free else turn.conversation.home
        return bool(free)

    def serve(self, full: set[str], changed: set[str], now: float = 0.0) -> list[str]:
        """The turns that are tried."""
        self.full, self.tried = full, []
        self.queue.changed |= changed
        self.queue.serve(self.place, {"d0", "d1"}, now)
        return self.tried


def test_a_turn_that_waits_claims_its_home_and_one_without_a_home_claims_all_workers() -> None:
    served = Served(lambda turn, now: False)
    queue = served.queue
    for turn in (waiting("a", "d0"), waiting("b", "d1"), waiting("c", None), waiting("d", "d1")):
        queue.append(turn, 0.0)
    assert served.serve({"d0"}, {"d0", "d1"}) == ["a", "b", "c", "d"], "c takes d1, which a does not claim"
    assert len(queue) == 1
    queue.append(waiting("e", None), 0.0)
    queue.append(waiting("f", "d0"), 0.0)
    assert served.serve({"d0", "d1"}, set()) == ["e"], "f is not tried: all workers are claimed"
    assert served.serve(set(), {"d0"}) == ["a", "e", "f"]
    assert not queue


def test_only_what_waits_for_a_worker_that_has_changed_is_tried_again() -> None:
    served = Served(lambda turn, now: False)
    for turn in (waiting("a", "d0"), waiting("b", "d1"), waiting("c", "d0")):
        served.queue.append(turn, 0.0)
    assert served.serve({"d0", "d1"}, set()) == ["a", "b", "c"]
    assert served.serve({"d0", "d1"}, set()) == []
    assert served.serve({"d1"}, {"d1"}) == [], "it is still full"
    assert served.serve({"d1"}, {"d0"}) == ["a", "c"]
    assert [turn.id for _, turn in served.queue.line("d1")] == ["b"]


def test_what_a_cancelled_turn_has_claimed_is_tried_by_those_behind_it() -> None:
    served = Served(lambda turn, now: False)
    first, before = waiting("a", None), waiting("b", None)
    before.said = Said(priority=-1)
    served.queue.append(first, 0.0)
    served.serve({"d0", "d1"}, {"d0", "d1"})
    served.queue.append(before, 0.0)
    changed = {"d0"}  # still too small for b
    assert served.serve({"d0", "d1"}, changed) == ["b"]
    served.queue.remove(before)
    assert served.serve(set(), changed) == ["a"]


def test_a_newcomer_claims_nothing_while_it_has_patience_and_keeps_those_behind_it_waiting() -> None:
    served = Served(lambda turn, now: now < 1.0)
    queue, both = served.queue, {"d0", "d1"}
    first, second = waiting("a", None), waiting("b", None)
    beside = waiting("c", None, beside=first)
    for turn in (first, second, beside):
        queue.append(turn, 0.0)
    assert served.serve(both, set(both)) == ["a"]
    assert served.serve(both, set(both), now=1.0) == ["a"], "its patience is over"
    assert [turn for _, turn in queue.line(Group.NEWCOMERS)] == [second, beside]
    queue.append(waiting("d", "d0"), 1.0)
    assert served.serve(both, set(both), now=1.0) == ["a"], "it claims all workers"
    assert served.serve(set(), set(both), now=1.0) == ["a", "c", "d", "b"]
    assert len(queue) == 0


def test_retry_after_is_what_the_queue_takes() -> None:
    made = scheduler("d0", max_turns=1, max_queued=2)
    now = 1_000_000.0  # seconds of some clock: not its distance from zero counts
    for i in range(20):
        _, run = run_of(submit(made, f"t{i}", [i + 1] * 20, now=now))
        now += 0.5
        end(made, "d0", run.turn, now)
    for i in range(3):
        submit(made, f"q{i}", [i + 50] * 20, now=now)
    with pytest.raises(QueueFull) as full:
        made.check_room(now)
    assert full.value.retry_after == 1, "two wait, two end each second"


def test_a_request_that_found_room_may_submit_all_its_turns() -> None:
    made = scheduler("d0", max_turns=1, max_queued=2)
    made.check_room(0.0)
    for i in range(8):
        submit(made, f"t{i}", [i + 1] * 20)
    assert made.queued == 7
    with pytest.raises(QueueFull):
        made.check_room(0.0)


def test_a_policy_that_breaks_loses_no_turn() -> None:
    made = scheduler("d0", max_turns=1)
    _, run = run_of(submit(made, "a", [1] * 40))
    submit(made, "b", [2] * 40)
    place, made.policy.place = made.policy.place, lambda need, cluster: 1 / 0
    submit(made, "c", [3] * 40)
    with pytest.raises(ZeroDivisionError):
        made.on_tick(0.0)
    made.policy.place = place
    assert made.queued == 2
    assert run_of(end(made, "d0", run.turn))[1].turn == "b.1"


def test_a_queued_turn_keeps_later_ones_from_its_home_but_from_no_other() -> None:
    made = scheduler("d0", "d1", max_turns=1)
    homes = {}
    for name in ("a", "b"):
        homes[name], run = run_of(submit(made, name, [ord(name)] * 40, key=name))
        end(made, homes[name], run.turn)
    assert len(set(homes.values())) == 2
    _, running = run_of(submit(made, "a2", [ord("a")] * 60, key="a"))
    assert sent(submit(made, "a3", [ord("a")] * 80, key="a"), Run) == []
    worker, _ = run_of(submit(made, "b2", [ord("b")] * 60, key="b"))
    assert worker == homes["b"]
    assert sent(submit(made, "new", [9] * 40), Run) == []
    worker, run = run_of(end(made, homes["a"], running.turn))
    assert (worker, run.turn) == (homes["a"], "a3.1"), "first come, first served"


def test_a_turn_whose_home_is_an_idle_prefiller_does_not_wait_for_a_decoder() -> None:
    made = scheduler("p0", "d0", policy="observe")
    submit(made, "a1", [1] * 900, "a", 0.0)
    home, first = run_of(submit(made, "b1", [2] * 800, "b", 0.1))
    assert home == "p0", "d0 is full"
    end(made, "p0", first.turn, 1.0)
    assert submit(made, "a2", [1] * 900, "a", 2.0) == [], "waits for room on d0"
    assert run_of(submit(made, "b2", [2] * 801 + [3] * 10, "b", 3.0))[0] == "p0"


def test_a_queued_turn_whose_home_has_died_blocks_no_turn_with_a_home() -> None:
    made = scheduler("d0", "d1", policy="observe", max_turns=2, max_queued=100)
    lost, run = run_of(submit(made, "a", [1] * 40, key="a"))
    end(made, lost, run.turn, 0.1)
    other = {"d0": "d1", "d1": "d0"}[lost]
    made.workers[lost].change(1, 1, 0.1)
    run_of(submit(made, "b", [2] * 40, key="b", now=0.1))
    made.workers[lost].change(1, 1, 0.1)
    made.workers[other].wanted = 95.0
    assert sent(submit(made, "a2", [1] * 60, key="a", now=0.2), Run) == []
    made.worker_down(lost, returns=True, now=0.2)
    assert made.queued == 1
    assert run_of(submit(made, "b2", [2] * 60, key="b", now=0.2))[0] == other


def test_a_turn_that_has_lost_its_worker_comes_before_newcomers() -> None:
    made = scheduler("d0", "d1", policy="observe", max_turns=1, max_queued=9)
    homes = {}
    for name in ("a", "b"):
        homes[name], run = run_of(submit(made, name, [ord(name)] * 40, key=name))
        report(made, homes[name], run.turn, 0, 7, cached_tokens=0)
    assert sent(submit(made, "c", [3] * 40, key="c"), Run) == []
    assert sent(made.worker_down(homes["a"], returns=True), Run) == []
    assert made.queued == 2
    home, again = run_of(made.cancel("b", 0.1))
    assert (home, again.turn, again.tokens) == (homes["b"], "a.2", [ord("a")] * 40 + [7])


def test_turns_with_a_home_pass_a_newcomer_that_waits_for_room() -> None:
    made = scheduler("d0", policy="observe", max_queued=9)
    home, run = run_of(submit(made, "a1", [1] * 800, key="a"))
    end(made, home, run.turn, 1.0)
    assert made.workers["d0"].wanted == 34, "51 pages times the chance that it returns, 2/3 as nothing was seen"
    _, busy = run_of(submit(made, "b1", [2] * 16, key="b", now=1.0))
    assert sent(submit(made, "c1", [3] * 1000, key="c", now=1.1), Run) == [], "64 pages and a tenth of 100 do not fit"
    assert sent(submit(made, "d1", [4] * 16, key="d", now=1.1), Run) == [], "first come, first served"
    _, again = run_of(submit(made, "a2", [1] * 820, key="a", now=1.2))
    assert again.turn == "a2.1"
    assert made.queued == 2
    _, small = run_of(made.cancel("c1", 1.3))
    assert small.turn == "d1.1", "what is smaller fits"
    end(made, "d0", busy.turn, 1.4)
    assert made.queued == 0


@pytest.mark.parametrize("policy", [name for name in POLICIES if name != "observe"])
def test_under_other_policies_a_newcomer_that_waits_is_not_passed(policy: str) -> None:
    made = scheduler("d0", policy=policy, max_queued=9)
    _, run = run_of(submit(made, "a1", [1] * 200, key="a"))
    end(made, "d0", run.turn)
    run_of(submit(made, "b1", [2] * 1200, key="b"))
    assert sent(submit(made, "c1", [3] * 700, key="c"), Run) == []
    assert sent(submit(made, "a2", [1] * 220, key="a"), Run) == []


def test_a_newcomer_is_placed_after_its_patience_however_full_the_worker_is() -> None:
    made = scheduler("d0", policy="observe", max_turns=9, max_queued=9)
    now = returning(made, "a", [1] * 800, gap=100.0)
    assert made.workers["d0"].wanted == 25.5
    run_of(submit(made, "b1", [2] * 16, key="b", now=now))
    report_steps(made, "d0", *(StepTime(n, n * n // 2, 0, 0, n / 1000) for n in (512, 1024)), now=now)
    assert sent(submit(made, "c1", [3] * 1000, key="c", now=now), Run) == []
    assert sent(submit(made, "d1", [4] * 1000, key="d", now=now + 1), Run) == []
    came: list[tuple[str, float]] = []
    for tenth in range(250):  # a second to compute, nearly another one for b: eight times that
        at = now + tenth / 10
        for _, run in sent(made.on_tick(at), Run):
            came.append((run.turn, at - now))
    assert [turn for turn, _ in came] == ["c1.1"], "the other one does not fit beside it at all"
    assert came[0][1] == pytest.approx(16, abs=0.3)
    assert made.workers["d0"].wanted == 25.5, "a is still expected"
    (_, last) = run_of(made.cancel("c1", now + 25))
    assert last.turn == "d1.1", "a newcomer without patience is placed as soon as there are pages"


def test_a_newcomer_that_has_waited_long_enough_keeps_room_from_others() -> None:
    """Two conversations of 33 pages return as soon as they have ended; one of 76 must not wait for ever."""
    made = scheduler("d0", policy="observe", max_turns=10, max_queued=100)
    steps = [StepTime(n, n * n // 2, 0, 0, n / 1000) for n in (64, 512)]
    report_steps(made, "d0", *steps, StepTime(0, 0, 1, 100, 0.01))
    running = {key: run_of(submit(made, key, [ord(key)] * 500, key=key))[1].turn for key in "ab"}
    assert sent(submit(made, "big", [9] * 1200, key="big"), Run) == []
    for n in range(100):
        now = 0.5 + n / 2
        placed = []
        for key, turn in list(running.items()):
            placed += sent(report(made, "d0", turn, 0, 5, now, finish="stop", cached_tokens=0), Run)
            del running[key]
            placed += sent(submit(made, f"{key}{n}", [ord(key)] * 500, key=key, now=now), Run)
        running |= {run.turn[0]: run.turn for _, run in placed}
        if any(run.turn == "big.1" for _, run in placed):
            break
    assert 4 * 1.2 < now < 40, "later than it is worth, but not much"


def test_room_that_appears_is_given_to_newcomers_in_their_order() -> None:
    made = scheduler("d0", policy="observe", max_turns=9, max_queued=9)
    now = returning(made, "a", [1] * 500, gap=100.0)
    _, long = run_of(submit(made, "b1", [2] * 1000, key="b", now=now))
    for name in ("c1", "d1", "e1", "f1"):
        assert sent(submit(made, name, [ord(name[0])] * 300, key=name[0], now=now), Run) == []
    assert made.queued == 4
    assert made.cancel("d1", now) == []
    assert made.queued == 3
    _, run = run_of(end(made, "d0", long.turn, now + 0.1))
    assert run.turn == "c1.1", "beside what a and b are expected to need again there is room for one"
    assert made.workers["d0"].room > 10
    _, run = run_of(end(made, "d0", run.turn, now + 0.2))
    assert run.turn == "e1.1"
    assert made.queued == 1


def test_a_turn_beside_a_newcomer_of_its_conversation_follows_it_home() -> None:
    made = scheduler("d0", "d1", policy="observe", max_turns=9, max_queued=9)
    for view in made.workers.values():
        view.change(1, 95, 0.0)
    for name in ("c1", "c2", "c3"):
        assert sent(submit(made, name, [3] * 160, key="c"), Run) == []
    made.workers["d1"].change(-1, -95, 0.0)
    placed = sent(made.on_tick(0.1), Run)
    assert [(home, run.turn) for home, run in placed] == [("d1", "c1.1"), ("d1", "c2.1"), ("d1", "c3.1")]
    assert made.queued == 0


def test_turns_of_a_conversation_that_has_found_its_home_do_not_wait_behind_a_newcomer() -> None:
    made = scheduler("d0", policy="observe", max_turns=8, max_queued=100)
    made.workers["d0"].wanted = 92.0
    run_of(submit(made, "z", [8] * 8, key="z"))
    for turn, tokens in (("a1", 40), ("b1", 400), ("a2", 40)):
        assert sent(submit(made, turn, [ord(turn[0])] * tokens, key=turn[0]), Run) == []
    made.workers["d0"].wanted = 60.0
    assert [run.turn for _, run in sent(made.on_tick(0.0), Run)] == ["a1.1", "a2.1"]
    assert [turn.id for _, turn in made._queue.line(Group.NEWCOMERS)] == ["b1"]


@pytest.mark.parametrize("waiting", [1, 300])
def test_a_tick_asks_the_policy_once_for_all_newcomers_that_wait_and_a_report_does_not(waiting: int) -> None:
    made = scheduler("d0", "d1", policy="observe", max_turns=9, max_queued=1000)
    for view in made.workers.values():
        view.change(1, 95, 0.0)
    for n in range(waiting):
        submit(made, f"t{n}", [n + 1] * 160)
    asked = []
    place = made.policy.place
    made.policy.place = lambda need, cluster: asked.append(need) or place(need, cluster)
    assert report_steps(made, "d0", now=0.1) == []
    assert not asked, "nothing has changed"
    assert made.on_tick(0.1) == []
    assert len(asked) == 1
    assert made.queued == waiting


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("waiting", [2, 300])
def test_no_policy_is_asked_about_turns_that_wait_for_a_full_home(policy: str, waiting: int) -> None:
    made = scheduler("d0", "d1", policy=policy, max_turns=9, max_queued=1000)
    for n in range(waiting):
        home, run = run_of(submit(made, f"t{n}", [n + 1] * 160, key=n + 1))
        end(made, home, run.turn, 0.1)
        made.conversations.get(n + 1).home = "d0"
    made.workers["d0"].change(1, 95, 0.1)
    made.workers["d1"].change(1, 75, 0.1)
    for n in range(waiting):
        assert submit(made, f"w{n}", [n + 1] * 400, key=n + 1, now=0.1) == [], "10 of 100 pages have to stay free"
    asked = []
    place = made.policy.place
    made.policy.place = lambda need, cluster: asked.append(need) or place(need, cluster)
    assert report_steps(made, "d1", now=0.2) == []
    assert made.on_tick(0.2) == []
    assert not asked, "none fits"
    made.workers["d0"].change(-1, -95, 0.3)
    assert [run.turn for _, run in sent(made.on_tick(0.3), Run)][:2] == ["w0.1", "w1.1"]


def test_a_turn_finds_room_elsewhere_behind_one_for_which_there_is_none() -> None:
    made = scheduler("d0", "d1", policy="observe", max_turns=9, max_queued=9)
    for key in (1, 2, 3):
        home, run = run_of(submit(made, f"t{key}", [key] * 40, key=key))
        end(made, home, run.turn, 0.1)
        made.conversations.get(key).home = "d0"
    made.workers["d0"].change(1, 99, 0.1)
    made.workers["d1"].change(1, 60, 0.1)
    assert submit(made, "large", [1] * 800, key=1, now=0.2) == []
    assert submit(made, "larger", [2] * 900, key=2, now=0.2) == []
    assert run_of(submit(made, "small", [3] * 80, key=3, now=0.2))[0] == "d1"
    assert made.queued == 2


def test_turns_of_a_new_conversation_line_up_for_the_home_that_the_first_one_finds() -> None:
    made = scheduler("d0", "d1", policy="colocated", max_turns=1, max_queued=9)
    for view in made.workers.values():
        view.change(1, 1, 0.0)
    for n in range(3):
        submit(made, f"a{n}", [1] * 40, key="a")
    submit(made, "b", [2] * 40, key="b")
    made.workers["d0"].change(-1, -1, 0.0)
    assert [(home, run.turn) for home, run in sent(made.on_tick(0.1), Run)] == [("d0", "a0.1")]
    made.workers["d1"].change(-1, -1, 0.1)
    assert [(home, run.turn) for home, run in sent(made.on_tick(0.2), Run)] == [("d1", "b.1")], "passes those of d0"
    assert [run.turn for _, run in sent(end(made, "d0", "a0.1", 0.3), Run)] == ["a1.1"]


def test_one_agent_with_fifty_sub_agents_does_not_hold_up_another() -> None:
    """Of two groups that wait the one with a single turn is served next, and what the other has waits no longer than
    its share: newcomers that keep coming do not pass it for ever."""
    made = scheduler("d0", policy="colocated", max_turns=1, max_queued=999)
    run = run_of(submit(made, "first", [9] * 40, key="z"))[1].turn
    for n in range(50):
        submit(made, f"sub{n}", [1, n] * 40, key=f"s{n}", said=Said(parent="agent"))
    served = []
    for n in range(60):
        submit(made, f"other{n}", [2, n] * 40, key=f"o{n}")
        ((_, placed),) = sent(end(made, "d0", run, 0.1 * n), Run)
        run = placed.turn
        served.append(run.partition(".")[0])
    assert served[:2] == ["sub0", "other0"], "the first one came before the other"
    subs = [sum(name.startswith("sub") for name in served[:count]) for count in (10, 20, 40, 60)]
    assert subs == sorted(set(subs)), "it goes on, with the share of one among more and more groups"


def test_a_group_is_not_charged_for_what_is_cancelled() -> None:
    queue = Served(lambda turn, now: False).queue
    queue.append(waiting("a0", None, group="a"), 0.0)
    for _ in range(5):
        again = waiting("again", None, group="a")
        queue.append(again, 0.0)
        queue.remove(again)
    for name in ("a1", "b0", "b1", "a2"):
        queue.append(waiting(name, None, group=name[0]), 0.0)
    assert [turn.id for _, turn in queue.line(Group.ANYWHERE)] == ["a0", "b0", "a1", "b1", "a2"]


def test_a_group_does_not_wait_for_what_it_lets_others_pass() -> None:
    queue = Served(lambda turn, now: False).queue
    for name, priority in (("a-later", 1), ("a0", 0), ("b0", 0)):
        turn = waiting(name, None, group=name[0])
        turn.said = Said(priority=priority)
        queue.append(turn, 0.0)
    assert [turn.id for _, turn in queue.line(Group.ANYWHERE)] == ["a0", "b0", "a-later"]


def test_a_newcomer_whose_patience_is_over_keeps_the_place_of_its_group() -> None:
    served = Served(lambda turn, now: now < 1)
    for n in range(9):
        served.queue.append(waiting(f"sub{n}", None, group="agent"), 0.0)
    full = {"d0", "d1"}
    served.serve(full, set(full), 2.0)
    assert [turn.id for _, turn in served.queue.line(Group.ANYWHERE)] == ["sub0"]
    served.queue.append(waiting("home", "d0"), 2.0)
    assert served.serve(set(), set(full), 2.0)[:2] == ["sub0", "home"], "not behind all that its group still wants"


def test_sub_agents_that_come_at_once_follow_the_prefix_that_the_first_one_computes() -> None:
    made = scheduler("d0", "d1", policy="observe", max_turns=9, max_queued=9)
    for name in ("d0", "d1"):
        report_steps(made, name, *(StepTime(size, size * size // 2, 0, 0, size * 1e-3) for size in (64, 128, 256, 512)))
    homes = [run_of(submit(made, name, [ord(name[0])] * 320, key=name))[0] for name in ("sub0", "other")]
    assert homes == ["d0", "d1"]
    shared = [run_of(submit(made, f"sub{n}", [ord("s")] * 320 + [n] * 10, key=f"sub{n}"))[0] for n in range(1, 4)]
    assert shared == ["d0"] * 3, "the prefix is under way there"


def test_turns_of_groups_of_one_are_served_in_the_order_in_which_they_came() -> None:
    made = scheduler("d0", policy="colocated", max_turns=1, max_queued=99)
    run = run_of(submit(made, "first", [9] * 40, key="z"))[1].turn
    for n in range(20):
        submit(made, f"t{n}", [1, n] * random.Random(n).randrange(20, 60), key=f"t{n}", said=Said())
    for n in range(20):
        ((_, placed),) = sent(end(made, "d0", run), Run)
        run = placed.turn
        assert run == f"t{n}.1"


@pytest.mark.parametrize("policy", often(POLICIES, "observe", "conserve", "cache-aware"))
@given(seed=st.integers(0, 2**32))
@example(seed=12828)  # The first of a line moves away, and a turn before the next one of that line takes its home.
@settings(max_examples=60, deadline=None)
def test_commands_are_those_of_a_queue_that_tries_everything_at_each_event(policy: str, seed: int) -> None:
    """Two schedulers in one world: turns come, grow, end, are cancelled; workers die and return."""
    pick, now = random.Random(seed), 0.0
    workers = pick.choice([("d0",), ("d0", "d1"), ("p0", "d0", "d1"), ("p0", "d0", "d1", "d2", "d3")])
    both = [scheduler(*workers, policy=policy, max_turns=t, max_queued=10**6) for t in [pick.choice([1, 3, 9])] * 2]
    plain = both[1]
    plain._queue = PlainQueue(plain._queue)
    epochs = dict.fromkeys(workers, 1)

    def happens(event: Callable[..., list[Command]], *args: Any, **named: Any) -> None:
        found, wanted = (made.on_tick(now) + event(made, *args, **named) + made.on_tick(now) for made in both)
        assert found == wanted
        assert both[0].queued == plain.queued

    for number in range(150):
        now += pick.choice([0.0, 0.1, 1.0, 20.0])
        running = [turn for turn in plain.turns.values() if turn.run]
        what = pick.random()
        if what < 0.5:
            key, first = pick.choice("abcdefgh"), pick.choice([16, 40, 200, 700])
            tokens = [ord(key)] * first + [number] * pick.choice([0, 20])
            said = Said(priority=pick.choice([0, 0, 0, 1]), parent=pick.choice(["", "", "a"]))
            key += "" if number % 3 else str(number)  # Some begin a conversation of their own.
            happens(submit, f"t{number}", tokens, key, now, said)
        elif what < 0.85 and running:
            turn, finish = pick.choice(running), pick.choice(["stop", None])
            home, run, at = str(turn.home), str(turn.run), turn.delivered
            happens(report, home, run, at, 5, now, finish=finish, cached_tokens=0)
        elif what < 0.95 and len(plain.turns):
            gone = pick.choice([*plain.turns])
            happens(Scheduler.cancel, gone, now)
        elif what < 0.97:
            name = pick.choice(workers)
            epochs[name] += 1
            happens(Scheduler.worker_down, name, returns=True, now=now)
            happens(join, name, epochs[name], now)
