"""The scheduler's ledger and its word to clients, without workers: reports are made up."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miniserve.cluster.messages import Abort, Failed, Message, Peer, PoolInfo, Report, Run, StepTime, WorkerStats
from miniserve.sampling_params import SamplingParams
from miniserve.scheduler.baselines import POLICIES
from miniserve.scheduler.prefixes import Prefixes
from miniserve.scheduler.prompts import page_chain
from miniserve.scheduler.scheduler import Command, Deliver, NoDecoder, Note, QueueIsFull, Scheduler, Send
from tests.support.outputs import outputs

PAGE = 16
STATS = WorkerStats(100, 100, 0, 0, 0, 0, 0, 0)


def scheduler(*workers: str, policy: str = "conserve", max_turns: int = 4, max_queued: int = 4) -> Scheduler:
    made = Scheduler(POLICIES[policy](), PAGE, max_turns, max_queued)
    for name in workers:
        made.worker_up(Peer(name, 1, name, PoolInfo(1, 1, 100, 1, "")), prefiller=name.startswith("p"))
    return made


def submit(made: Scheduler, turn: str, tokens: list[int], key: str | int = "", now: float = 0.0) -> list[Command]:
    return made.submit(turn, tokens, SamplingParams(max_tokens=16), 0, key, "", now)


def sent(commands: list[Command], kind: type) -> list[tuple[str, Message]]:
    return [(c.worker, c.message) for c in commands if isinstance(c, Send) and isinstance(c.message, kind)]


def run_of(commands: list[Command]) -> tuple[str, Run]:
    ((worker, run),) = sent(commands, Run)
    return worker, run


def tell(made: Scheduler, worker: str, run: str, index: int, token: int, now: float = 0.0, **more) -> list[Command]:
    return made.on_report(worker, Report(outputs(run, index, [token], **more), [], STATS), now)


def delivered(commands: list[Command]) -> list[tuple[str, list[int]]]:
    return [(c.turn, c.output.tokens) for c in commands if isinstance(c, Deliver)]


def end(made: Scheduler, turn: str, worker: str, run: str, now: float = 0.0) -> list[Command]:
    return tell(made, worker, run, 0, 5, now, finish="stop")


def test_a_turn_that_runs_again_has_another_name() -> None:
    made = scheduler("p0", "d0", "d1")
    home, first = run_of(submit(made, "t", [1] * 40))
    assert delivered(tell(made, "p0", first.turn, 0, 7)) == [("t", [7])]
    other, second = run_of(made.worker_down(home, returns=False))
    assert other != home
    assert second.turn != first.turn
    assert (second.tokens, second.prior) == ([1] * 40 + [7], 1)
    assert tell(made, "p0", first.turn, 1, 8) == [], "words of a run that is over"
    assert delivered(tell(made, other, second.turn, 1, 9)) == [("t", [9])]


def test_a_worker_that_drew_another_first_token_is_set_right() -> None:
    """P gave the client a token and died with it; D computed the prompt itself and drew another one."""
    made = scheduler("p0", "d0")
    _, first = run_of(submit(made, "t", [1] * 40))
    assert delivered(tell(made, "p0", first.turn, 0, 7)) == [("t", [7])]
    made.worker_down("p0", returns=False)
    commands = tell(made, "d0", first.turn, 0, 8)
    assert sent(commands, Abort) == [("d0", Abort(first.turn))]
    _, second = run_of(commands)
    assert second.tokens == [1] * 40 + [7]
    assert delivered(commands) == []
    assert delivered(tell(made, "d0", second.turn, 1, 3)) == [("t", [3])]
    assert made.workers["d0"].turns == 1


def test_a_client_cannot_take_the_name_of_another_conversation() -> None:
    made = scheduler("d0")
    _, first = run_of(submit(made, "a", [1] * 40))
    _, second = run_of(submit(made, "b", [2] * 40, key="auto-1"))
    _, third = run_of(submit(made, "c", [3] * 40, key="1"))
    for turn, run in (("a", first), ("b", second), ("c", third)):
        end(made, turn, "d0", run.turn)
    assert len(made.conversations) == 3
    made.on_tick(1e9)
    assert len(made.conversations) == 0
    assert made.workers["d0"].resident == 0


def test_a_queued_turn_that_is_cancelled_leaves_the_ledger_as_it_was() -> None:
    made = scheduler("d0", max_turns=1)
    _, run = run_of(submit(made, "a", [1] * 40, key="c"))
    end(made, "a", "d0", run.turn)
    before = made.workers["d0"].resident
    assert before == 3
    submit(made, "b", [2] * 40)
    submit(made, "c", [1] * 60, key="c")
    assert made.queued == 1
    made.cancel("c", 0.0)
    assert made.workers["d0"].resident == before


def test_retry_after_is_what_the_queue_takes() -> None:
    made = scheduler("d0", max_turns=1, max_queued=2)
    now = 1_000_000.0  # seconds of some clock: not its distance from zero counts
    for i in range(20):
        _, run = run_of(submit(made, f"t{i}", [i + 1] * 20, now=now))
        now += 0.5
        end(made, f"t{i}", "d0", run.turn, now)
    for i in range(3):
        submit(made, f"q{i}", [i + 50] * 20, now=now)
    with pytest.raises(QueueIsFull) as full:
        made.check_room(now)
    assert full.value.retry_after == 1, "two wait, two end each second"


def test_a_request_that_was_let_in_may_submit_all_its_turns() -> None:
    made = scheduler("d0", max_turns=1, max_queued=2)
    made.check_room(0.0)
    for i in range(8):
        submit(made, f"t{i}", [i + 1] * 20)
    assert made.queued == 7
    with pytest.raises(QueueIsFull):
        made.check_room(0.0)


def test_a_conversation_is_found_by_the_name_that_it_was_given() -> None:
    """Even with a prompt that does not continue the last one."""
    made = scheduler("p0", "d0", "d1")
    home, first = run_of(submit(made, "t", [1] * 40))
    name = made.conversation_of("t")
    assert isinstance(name, int)
    submit(made, "k", [3] * 40, key="mine")
    assert made.conversation_of("k") == "mine"
    end(made, "t", home, first.turn)
    assert made.conversation_of("t") == ""
    again, _ = run_of(submit(made, "u", [2] * 40, key=name))
    assert (again, made.conversation_of("u")) == (home, name)
    submit(made, "v", [4] * 40)
    assert made.conversation_of("v") not in (name, "mine")


def test_choices_of_one_request_move_once() -> None:
    """Turns beside a first one find its KV on the way to their home: the prompt is prefilled by P once."""
    made = scheduler("p0", "d0")
    places = [run_of(submit(made, f"t{i}", [1] * 40, key="c"))[1].prefill_at for i in range(3)]
    assert places == ["p0", "", ""]


def test_turns_wait_for_a_decoder_that_returns() -> None:
    made = scheduler("p0", "d0")
    _, first = run_of(submit(made, "t", [1] * 40))
    assert delivered(tell(made, "p0", first.turn, 0, 7)) == [("t", [7])]
    assert sent(made.worker_down("d0", returns=True), Run) == []
    assert made.can_serve
    assert sent(submit(made, "u", [2] * 40), Run) == [], "new turns wait too"
    commands = made.worker_up(Peer("d0", 2, "d0.2", PoolInfo(1, 1, 100, 1, "")), prefiller=False)
    assert [run.tokens for _, run in sent(commands, Run)] == [[1] * 40 + [7], [2] * 40]
    made.worker_down("d0", returns=True)
    ends = made.worker_down("d0", returns=False)  # it could not be started
    assert [c.turn for c in ends if isinstance(c, Deliver) and isinstance(c.output, Failed)] == ["t", "u"]
    with pytest.raises(NoDecoder):
        submit(made, "v", [3] * 40)


def test_a_turn_that_workers_die_of_ends() -> None:
    made = scheduler("d0")
    submit(made, "bad", [1] * 40)
    ends = []
    for epoch in range(2, 5):
        ends += [c.output for c in made.worker_down("d0", returns=True) if isinstance(c, Deliver)]
        made.worker_up(Peer("d0", epoch, "", PoolInfo(1, 1, 100, 1, "")), prefiller=False)
    (output,) = ends
    assert isinstance(output, Failed)
    assert "3 workers died" in output.error
    assert made.active == 0


def up(name: str, epoch: int = 1, pages: int = 100) -> Peer:
    return Peer(name, epoch, f"{name}.{epoch}", PoolInfo(1, 1, pages, 1, ""))


def test_a_turn_that_generates_more_than_expected_takes_its_pages_in_the_ledger_too() -> None:
    made = scheduler("d0")
    _, run = run_of(submit(made, "t", [1] * 40))
    view = made.workers["d0"]
    assert view.reserved == 4, "40 tokens and 16 of output"
    made._turns["t"].params = SamplingParams()
    for i in range(60):
        tell(made, "d0", run.turn, i, 7)
    assert view.reserved == 7, "100 tokens and the next one"
    end_commands = tell(made, "d0", run.turn, 60, 7, finish="stop")
    assert delivered(end_commands) == [("t", [7])]
    assert (view.reserved, view.resident) == (0, 7)


def test_a_turn_gets_the_pages_that_its_conversation_has_needed() -> None:
    made = scheduler("d0")
    tokens = [1] * 40
    for n in range(3):
        _, run = run_of(made.submit(f"t{n}", tokens, SamplingParams(max_tokens=None), 0, "c", "", n))
        for i in range(200):
            tell(made, "d0", run.turn, i, 7, n + 0.5, finish="stop" if i == 199 else None, cached_tokens=i and None)
        tokens = tokens + [7] * 200
    made.submit("t3", tokens, SamplingParams(max_tokens=None), 0, "c", "", 9)
    assert made._turns["t3"].output == 200
    made.submit("new", [2] * 40, SamplingParams(max_tokens=10), 0, "", "", 9)
    assert made._turns["new"].output == 10


def test_what_a_prefiller_lends_is_given_back_once() -> None:
    made = scheduler("p0", "d0")
    _, run = run_of(submit(made, "t", [1] * 40))
    assert made.workers["p0"].reserved == 3
    tell(made, "p0", run.turn, 0, 7, cached_tokens=0)
    assert made.workers["p0"].reserved == 0
    _, run = run_of(submit(made, "u", [2] * 40))
    made.worker_down("p0", returns=True)
    made.worker_up(up("p0", 2), prefiller=True)
    tell(made, "d0", run.turn, 0, 7, cached_tokens=0)
    assert made.workers["p0"].reserved == 0, "the new one has lent nothing"


def test_a_placement_elsewhere_is_a_move_and_the_new_home_is_told_where_the_history_is() -> None:
    made = scheduler("d0", "d1", policy="observe", max_turns=1)
    home, run = run_of(submit(made, "t", [1] * 40, key="a"))
    end(made, "t", home, run.turn)
    other = {"d0": "d1", "d1": "d0"}[home]
    _, blocker = run_of(submit(made, "b", [3] * 40, key="b"))
    if made.conversations.get("b").home != home:  # fill the home of "a", not the other one
        end(made, "b", other, blocker.turn)
        made.workers[home].add_turn(1, 0.0)
    worker, again = run_of(submit(made, "u", [1] * 60, key="a"))
    assert (worker, again.history_at) == (other, home)
    found = made.conversations.get("a")
    assert (found.home, found.moves, found.moved_at) == (other, 1, 2)


def test_the_home_is_told_what_to_expect_of_a_conversation() -> None:
    made = scheduler("d0")
    for n in range(4):
        _, run = run_of(submit(made, f"t{n}", [1] * (40 + n), key="a", now=10.0 * n))
        tell(made, "d0", run.turn, 0, 5, 10.0 * n + 1, finish="stop", cached_tokens=0)
    assert run.keep.conversation == "a"
    assert run.keep.gap == 9.0
    assert 0.6 < run.keep.chance <= 1
    assert run.keep.page_seconds > 0


def test_notes_are_made_only_where_somebody_reads_them() -> None:
    made = scheduler("p0", "d0")
    assert not [c for c in submit(made, "t", [1] * 40) if isinstance(c, Note)]
    made = Scheduler(POLICIES["observe"](), PAGE, 4, 4, policy_name="observe", notes=True)
    made.worker_up(up("p0"), prefiller=True)
    made.worker_up(up("d0"), prefiller=False)
    commands = submit(made, "t", [1] * 40)
    (decision,) = (c.record for c in commands if isinstance(c, Note))
    assert (decision.policy, decision.home, decision.tokens, decision.turn) == ("observe", "d0", 40, 1)
    assert set(decision.workers) == {"p0", "d0"}
    assert [(o.home, o.prefill_at) for o in decision.options] == [("d0", ""), ("d0", "p0"), ("p0", "")]
    assert decision.options[0].cost > 0
    _, run = run_of(commands)
    commands = tell(made, "d0", run.turn, 0, 5, 2.0, finish="stop", cached_tokens=16, prefill=0.5)
    (outcome,) = (c.record for c in commands if isinstance(c, Note))
    assert outcome.run == decision.run == run.turn
    assert (outcome.cached, outcome.waited, outcome.prefill, outcome.finish) == (16, 1.5, 0.5, "stop")
    assert outcome.expected_first_token == decision.options[0].first_token
    assert outcome.first_token == 2.0


def test_a_queued_turn_keeps_later_ones_from_its_home_but_from_no_other() -> None:
    made = scheduler("d0", "d1", max_turns=1)
    homes = {}
    for name in ("a", "b"):
        homes[name], run = run_of(submit(made, name, [ord(name)] * 40, key=name))
        end(made, name, homes[name], run.turn)
    assert len(set(homes.values())) == 2
    _, running = run_of(submit(made, "a2", [ord("a")] * 60, key="a"))
    assert sent(submit(made, "a3", [ord("a")] * 80, key="a"), Run) == []
    worker, _ = run_of(submit(made, "b2", [ord("b")] * 60, key="b"))
    assert worker == homes["b"]
    assert sent(submit(made, "new", [9] * 40), Run) == []
    worker, run = run_of(end(made, "a2", homes["a"], running.turn))
    assert (worker, run.turn) == (homes["a"], "a3.1"), "first come, first served"


def test_prefixes_tell_who_has_computed_the_beginning_of_a_prompt() -> None:
    found = Prefixes(capacity=8)
    chain = page_chain(list(range(160)), "", PAGE)
    found.add(chain, "d0")
    assert found.find(chain) == {"d0": 8}
    assert found.find(chain[:6]) == {"d0": 4}
    found.add(chain[:4], "p0")
    assert found.find(chain) == {"d0": 8, "p0": 2}
    assert found.find(page_chain([1] * 160, "", PAGE)) == {}
    found.drop("d0")
    assert found.find(chain) == {"p0": 2}
    found.add(page_chain(list(range(500, 660)), "", PAGE), "d0")
    found.add(page_chain(list(range(900, 1060)), "", PAGE), "d0")
    assert len(found._workers) == 8
    assert found.find([]) == found.find(chain[:1]) == {}


def test_a_stream_at_home_on_a_prefiller_outlives_the_last_decoder() -> None:
    made = scheduler("p0", "d0", policy="observe")
    found = made.conversations.find("a", [1], page_chain([1], "", PAGE), 0.0).conversation
    found.home = "p0"
    home, run = run_of(submit(made, "t", [1] * 40, key="a"))
    assert home == "p0"
    submit(made, "u", [2] * 40, key="b")
    commands = made.worker_down("d0", returns=False)
    assert [c.turn for c in commands if isinstance(c, Deliver)] == ["u"]
    assert delivered(end(made, "t", "p0", run.turn)) == [("t", [5])]


def test_a_conversation_that_lives_on_a_prefiller_goes_on_while_the_decoder_is_away() -> None:
    made = scheduler("p0", "d0", policy="observe")
    found = made.conversations.find("a", [1], page_chain([1], "", PAGE), 0.0).conversation
    found.home = "p0"
    _, run = run_of(submit(made, "t", [1] * 40, key="a"))
    end(made, "t", "p0", run.turn)
    made.worker_down("d0", returns=True)
    home, _ = run_of(submit(made, "u", [1] * 60, key="a"))
    assert home == "p0"


def test_what_a_prefiller_says_late_changes_nothing() -> None:
    """D has given up and computed the prompt itself; then P's report of the same run comes, with another token."""
    made = scheduler("p0", "d0")
    _, run = run_of(submit(made, "t", [1] * 40))
    assert delivered(tell(made, "d0", run.turn, 0, 8)) == [("t", [8])]
    assert tell(made, "p0", run.turn, 0, 7) == []
    assert delivered(tell(made, "d0", run.turn, 1, 9)) == [("t", [9])]


def test_a_policy_that_breaks_loses_no_turn() -> None:
    made = scheduler("d0", max_turns=1)
    _, run = run_of(submit(made, "a", [1] * 40))
    submit(made, "b", [2] * 40)
    place, made._policy.place = made._policy.place, lambda need, cluster: 1 / 0
    with pytest.raises(ZeroDivisionError):
        submit(made, "c", [3] * 40)
    made._policy.place = place
    assert made.queued == 2
    assert run_of(end(made, "a", "d0", run.turn))[1].turn == "b.1"


def test_a_prefiller_that_died_is_not_thought_to_hold_the_prompt_when_it_returns() -> None:
    made = scheduler("p0", "d0")
    _, run = run_of(submit(made, "t", [1] * 400, key="a"))
    made.worker_down("p0", returns=True)
    made.worker_up(up("p0", 2), prefiller=True)
    tell(made, "d0", run.turn, 0, 7, cached_tokens=0)
    assert made.conversations.get("a").copy_at == ""
    assert made._prefixes.find(page_chain([1] * 400, "", PAGE)) == {"d0": 16}


def test_those_with_a_home_pass_a_newcomer_that_waits_for_room() -> None:
    made = scheduler("d0", policy="observe", max_queued=9)
    home, run = run_of(submit(made, "a1", [1] * 800, key="a"))
    end(made, "a1", home, run.turn, 1.0)
    assert made.workers["d0"].wanted == 34, "51 pages times the chance that it returns, 2/3 as nothing was seen"
    _, busy = run_of(submit(made, "b1", [2] * 16, key="b", now=1.0))
    assert sent(submit(made, "c1", [3] * 1000, key="c", now=1.1), Run) == [], "64 pages and a tenth of 100 do not fit"
    assert sent(submit(made, "d1", [4] * 16, key="d", now=1.1), Run) == [], "first come, first served"
    _, again = run_of(submit(made, "a2", [1] * 820, key="a", now=1.2))
    assert again.turn == "a2.1"
    assert made.queued == 2
    _, small = run_of(made.cancel("c1", 1.3))
    assert small.turn == "d1.1", "what is smaller fits"
    end(made, "b1", "d0", busy.turn, 1.4)
    assert made.queued == 0


def test_a_conversation_that_is_late_keeps_no_room() -> None:
    made = scheduler("d0", policy="observe", max_queued=9)
    _, run = run_of(submit(made, "a1", [1] * 800, key="a"))
    end(made, "a1", "d0", run.turn, 1.0)
    run_of(submit(made, "b1", [2] * 16, key="b", now=1.0))
    assert sent(submit(made, "c1", [3] * 1000, key="c", now=1.1), Run) == []
    assert made.on_tick(1.5) == []
    ((_, waited),) = sent(made.on_tick(2.5), Run)
    assert waited.turn == "c1.1"
    assert made.workers["d0"].wanted == 0
    assert made.workers["d0"].resident == 51, "the pages are still there, but nobody counts on it"
    assert not made._rest.late


def test_one_that_came_back_in_time_is_expected_anew() -> None:
    """Gaps of 10 s: late 31 s after the end of its last turn, not of the turn before."""
    made = scheduler("d0", policy="observe", max_turns=9)
    last = returning(made, "a", [1] * 160, gap=10.0)
    view = made.workers["d0"]
    assert view.wanted == 5.5, "11 pages; nobody has gone on after three turns yet"
    _, run = run_of(submit(made, "a4", [1] * 176, key="a", now=last + 10))
    assert view.wanted == 0, "it runs"
    tell(made, "d0", run.turn, 0, 5, last + 20, finish="stop", cached_tokens=0)
    for seconds, expected in ((20, True), (32, True), (50.9, True), (51.1, False)):
        made.on_tick(last + seconds)
        assert (view.wanted > 0) == expected, seconds
    assert view.resident == 12


@pytest.mark.parametrize("policy", [name for name in POLICIES if name != "observe"])
def test_elsewhere_a_newcomer_that_waits_lets_nobody_pass(policy: str) -> None:
    made = scheduler("d0", policy=policy, max_queued=9)
    _, run = run_of(submit(made, "a1", [1] * 200, key="a"))
    end(made, "a1", "d0", run.turn)
    run_of(submit(made, "b1", [2] * 1200, key="b"))
    assert sent(submit(made, "c1", [3] * 700, key="c"), Run) == []
    assert sent(submit(made, "a2", [1] * 220, key="a"), Run) == []


def test_what_is_expected_goes_with_its_worker_and_with_its_conversation() -> None:
    made = scheduler("d0", "d1", policy="observe")
    homes = []
    for n in range(4):
        home, run = run_of(submit(made, f"t{n}", [n + 1] * 400, key=f"k{n}"))
        end(made, f"t{n}", home, run.turn)
        homes.append(home)
    assert set(homes) == {"d0", "d1"}
    assert all(made.workers[name].wanted > 0 for name in ("d0", "d1"))
    made.worker_down("d0", returns=True)
    made.worker_up(Peer("d0", 2, "d0", PoolInfo(1, 1, 100, 1, "")), prefiller=False)
    assert made.workers["d0"].wanted == 0
    made.on_tick(1e9)
    assert len(made.conversations) == 0
    assert [(w.wanted, w.resident) for w in made.workers.values()] == [(0, 0), (0, 0)]


def returning(made: Scheduler, key: str, tokens: list[int], gap: float) -> float:
    """A conversation that has had three turns, `gap` seconds apart; when the last one ended."""
    now = 0.0
    for n in range(3):
        home, run = run_of(submit(made, f"{key}{n}", tokens, key=key, now=now))
        tell(made, home, run.turn, 0, 5, now + 1, finish="stop", cached_tokens=0)
        now += 1 + gap
    return now - gap


def test_a_newcomer_comes_in_after_what_its_coming_in_would_cost_however_full_it_is() -> None:
    made = scheduler("d0", policy="observe", max_turns=9, max_queued=9)
    now = returning(made, "a", [1] * 800, gap=100.0)
    assert made.workers["d0"].wanted == 25.5
    run_of(submit(made, "b1", [2] * 16, key="b", now=now))
    made.on_report("d0", Report([], [], STATS, [StepTime(n, n * n // 2, 0, 0, n / 1000) for n in (512, 1024)]), now)
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
    assert last.turn == "d1.1", "who has waited long enough comes in as soon as there are pages"


def test_room_that_appears_is_given_to_newcomers_in_their_order() -> None:
    made = scheduler("d0", policy="observe", max_turns=9, max_queued=9)
    now = returning(made, "a", [1] * 500, gap=100.0)
    _, long = run_of(submit(made, "b1", [2] * 1000, key="b", now=now))
    for name in ("c1", "d1", "e1", "f1"):
        assert sent(submit(made, name, [ord(name[0])] * 300, key=name[0], now=now), Run) == []
    assert made.queued == 4
    assert made.cancel("d1", now) == []
    assert made.queued == 3
    _, run = run_of(end(made, "b1", "d0", long.turn, now + 0.1))
    assert run.turn == "c1.1", "beside what a and b are expected to need again there is room for one"
    assert made.workers["d0"].room > 10
    _, run = run_of(end(made, "c1", "d0", run.turn, now + 0.2))
    assert run.turn == "e1.1"
    assert made.queued == 1


def test_a_turn_beside_a_newcomer_of_its_conversation_follows_it_home() -> None:
    made = scheduler("d0", "d1", policy="observe", max_turns=9, max_queued=9)
    for view in made.workers.values():
        view.add_turn(95, 0.0)
    for name in ("c1", "c2", "c3"):
        assert sent(submit(made, name, [3] * 160, key="c"), Run) == []
    made.workers["d1"].drop_turn(95, 0.0)
    placed = sent(made.on_tick(0.1), Run)
    assert [(home, run.turn) for home, run in placed] == [("d1", "c1.1"), ("d1", "c2.1"), ("d1", "c3.1")]
    assert made.queued == 0


def test_who_has_lost_its_worker_comes_before_newcomers() -> None:
    made = scheduler("d0", "d1", policy="observe", max_turns=1, max_queued=9)
    homes = {}
    for name in ("a", "b"):
        homes[name], run = run_of(submit(made, name, [ord(name)] * 40, key=name))
        tell(made, homes[name], run.turn, 0, 7, cached_tokens=0)
    assert sent(submit(made, "c", [3] * 40, key="c"), Run) == []
    assert sent(made.worker_down(homes["a"], returns=True), Run) == []
    assert made.queued == 2
    home, again = run_of(made.cancel("b", 0.1))
    assert (home, again.turn, again.tokens) == (homes["b"], "a.2", [ord("a")] * 40 + [7])


@pytest.mark.parametrize("waiting", [1, 300])
def test_a_report_asks_once_for_all_newcomers_that_wait(waiting: int) -> None:
    made = scheduler("d0", "d1", policy="observe", max_turns=9, max_queued=1000)
    for view in made.workers.values():
        view.add_turn(95, 0.0)
    for n in range(waiting):
        submit(made, f"t{n}", [n + 1] * 160)
    asked = []
    place = made._policy.place
    made._policy.place = lambda need, cluster: asked.append(need) or place(need, cluster)
    assert made.on_report("d0", Report([], [], STATS), 0.1) == []
    assert len(asked) == 1
    assert made.queued == waiting


def test_a_conversation_lives_on_a_prefiller_as_on_any_worker() -> None:
    made = scheduler("p0", "d0", policy="observe", max_turns=64, max_queued=9)
    steps = [StepTime(0, 0, batch, 100 * batch, 0.02 + 0.005 * batch) for batch in (1, 2, 4, 8, 16)]
    steps += [StepTime(n, n * n // 2, 0, 0, n / 1000) for n in (64, 512)]
    for name in ("p0", "d0"):
        made.on_report(name, Report([], [], STATS, steps), 0.0)
    for _ in range(16):
        made.workers["d0"].add_turn(1, 0.0)
    home, run = run_of(submit(made, "a1", [1] * 40, key="a"))
    assert (home, run.prefill_at, run.history_at) == ("p0", "", "")
    view = made.workers["p0"]
    assert (view.turns, view.reserved) == (1, 4)
    end(made, "a1", home, run.turn, 1.0)
    assert (view.turns, view.reserved, view.resident) == (0, 0, 3)
    assert view.wanted == pytest.approx(2)
    home, run = run_of(submit(made, "a2", [1] * 60, key="a", now=1.5))
    assert (home, run.prefill_at, run.history_at) == ("p0", "", "")
    assert view.wanted == 0, "it has come back"
    ((home, run),) = sent(made.worker_down("p0", returns=True, now=2.0), Run)
    assert (home, run.turn, run.history_at) == ("d0", "a2.2", "")


def check_wanted(made: Scheduler, policy: str) -> None:
    """What a worker expects is the sum over those who rest there, and no more than they hold."""
    here = dict.fromkeys(made.workers, 0.0)
    for conversation in made.conversations:
        assert 0 <= conversation.wanted <= conversation.resident
        assert not (conversation.active and conversation.resident), "one that runs holds what the ledger has reserved"
        if conversation.home:
            here[conversation.home] += conversation.wanted
    for name, view in made.workers.items():
        assert view.wanted == pytest.approx(here[name], abs=1e-6)
        assert view.reserved >= 0
    assert all(turn.conversation.home or policy == "observe" for turn in made._lines.newcomers)


@pytest.mark.parametrize("policy", POLICIES)
@given(seed=st.integers(0, 2**32))
@settings(max_examples=40, deadline=None)
def test_what_is_expected_comes_to_nothing_in_the_end(policy: str, seed: int) -> None:
    """Turns, forks, moves, cancels, deaths and long silences in any order."""
    pick, now = random.Random(seed), 0.0
    workers = pick.choice([("d0",), ("d0", "d1"), ("p0", "d0"), ("p0", "d0", "d1")])
    made = scheduler(*workers, policy=policy, max_turns=pick.choice([1, 3, 9]), max_queued=10**6)
    made.conversations._capacity = pick.choice([3, 1000])
    epochs = dict.fromkeys(workers, 1)
    number = 0

    def ends(turn: str, token: int) -> None:
        of = made._runs[turn]
        tell(made, of.home, turn, of.delivered, token, now, finish=pick.choice(["stop", None]), cached_tokens=0)

    for _ in range(120):
        now += pick.choice([0.0, 0.1, 1.0, 20.0])
        what = pick.random()
        if what < 0.4:
            number += 1
            tokens = [pick.randint(1, 3)] * pick.choice([16, 40, 200, 700])
            submit(made, f"t{number}", tokens + [number] * pick.choice([0, 20]), pick.choice(["", "a", "b", "c"]), now)
        elif what < 0.75 and made._runs:
            ends(pick.choice(list(made._runs)), 5)
        elif what < 0.85 and made.active:
            made.cancel(pick.choice([turn.id for turn in made.turns]), now)
        elif what < 0.88:
            name = pick.choice(workers)
            made.worker_down(name, returns=True, now=now)
            epochs[name] += 1
            made.worker_up(up(name, epochs[name]), prefiller=name.startswith("p"), now=now)
        elif what < 0.9:
            made.on_tick(now + pick.choice([0, 5000]))
        check_wanted(made, policy)
    for _ in range(10_000):
        if not made.active:
            break
        now += 1.0
        assert made._runs, "somebody waits though nobody runs"
        ends(next(iter(made._runs)), 5)
        check_wanted(made, policy)
    assert (made.active, made.queued) == (0, 0)
    made.on_tick(now + 3000)
    assert all(view.wanted == pytest.approx(0, abs=1e-6) for view in made.workers.values())
    made.on_tick(now + 1e6)
    assert [(view.reserved, view.turns, view.resident) for view in made.workers.values()] == [(0, 0, 0)] * len(workers)
    assert (len(made.conversations), made._rest.late) == (0, [])


def test_a_newcomer_that_has_waited_long_enough_keeps_room_from_others() -> None:
    """Two conversations of 33 pages return as soon as they have ended; one of 76 must not wait for ever."""
    made = scheduler("d0", policy="observe", max_turns=10, max_queued=100)
    steps = [StepTime(n, n * n // 2, 0, 0, n / 1000) for n in (64, 512)]
    made.on_report("d0", Report([], [], STATS, [*steps, StepTime(0, 0, 1, 100, 0.01)]), 0.0)
    running = {key: run_of(submit(made, key, [ord(key)] * 500, key=key))[1].turn for key in "ab"}
    assert sent(submit(made, "big", [9] * 1200, key="big"), Run) == []
    for n in range(100):
        now = 0.5 + n / 2
        placed = []
        for key, turn in list(running.items()):
            placed += sent(tell(made, "d0", turn, 0, 5, now, finish="stop", cached_tokens=0), Run)
            del running[key]
            placed += sent(submit(made, f"{key}{n}", [ord(key)] * 500, key=key, now=now), Run)
        running |= {run.turn[0]: run.turn for _, run in placed}
        if any(run.turn == "big.1" for _, run in placed):
            break
    assert 4 * 1.2 < now < 40, "later than it is worth, but not much"


def test_a_queued_turn_whose_home_has_died_blocks_nobody_with_a_home() -> None:
    made = scheduler("d0", "d1", policy="observe", max_turns=2, max_queued=100)
    lost, run = run_of(submit(made, "a", [1] * 40, key="a"))
    end(made, "a", lost, run.turn, 0.1)
    other = {"d0": "d1", "d1": "d0"}[lost]
    made.workers[lost].add_turn(1, 0.1)
    run_of(submit(made, "b", [2] * 40, key="b", now=0.1))
    made.workers[lost].add_turn(1, 0.1)
    made.workers[other].wanted = 95.0
    assert sent(submit(made, "a2", [1] * 60, key="a", now=0.2), Run) == []
    made.worker_down(lost, returns=True, now=0.2)
    assert made.queued == 1
    assert run_of(submit(made, "b2", [2] * 60, key="b", now=0.2))[0] == other


def test_turns_of_a_conversation_that_has_found_its_home_do_not_wait_behind_a_newcomer() -> None:
    made = scheduler("d0", policy="observe", max_turns=8, max_queued=100)
    made.workers["d0"].wanted = 92.0
    run_of(submit(made, "z", [8] * 8, key="z"))
    for turn, tokens in (("a1", 40), ("b1", 400), ("a2", 40)):
        assert sent(submit(made, turn, [ord(turn[0])] * tokens, key=turn[0]), Run) == []
    made.workers["d0"].wanted = 60.0
    assert [run.turn for _, run in sent(made.on_tick(0.0), Run)] == ["a1.1", "a2.1"]
    assert [turn.id for turn in made._lines.newcomers] == ["b1"]


def test_an_expectation_begins_anew_after_a_turn_was_cancelled_in_the_queue() -> None:
    made = scheduler("d0", policy="observe", max_turns=1, max_queued=100)
    for n in range(4):  # gaps of 10 s, the last end at 34
        _, run = run_of(submit(made, f"t{n}", [1] * 40, key="a", now=11.0 * n))
        tell(made, "d0", run.turn, 0, 5, 11.0 * n + 1, finish="stop", cached_tokens=0)
    run_of(submit(made, "blocker", [2] * 40, key="b", now=60.0))
    assert sent(submit(made, "t9", [1] * 40, key="a", now=61.0), Run) == []
    made.cancel("t9", 62.0)
    assert made.conversations.get("a").wanted > 0
    made.on_tick(70.0)  # past 34 + 3 x 10 + 1
    assert made.conversations.get("a").wanted > 0
    made.on_tick(94.0)
    assert made.conversations.get("a").wanted == 0


def test_a_turn_whose_home_is_an_idle_prefiller_does_not_wait_for_a_decoder() -> None:
    made = scheduler("p0", "d0", policy="observe")
    submit(made, "a1", [1] * 900, "a", 0.0)
    home, first = run_of(submit(made, "b1", [2] * 800, "b", 0.1))
    assert home == "p0", "d0 is full"
    end(made, "b1", "p0", first.turn, 1.0)
    assert submit(made, "a2", [1] * 900, "a", 2.0) == [], "waits for room on d0"
    assert run_of(submit(made, "b2", [2] * 801 + [3] * 10, "b", 3.0))[0] == "p0"
