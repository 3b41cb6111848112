"""Turns and conversations over made-up workers: what clients get, deaths, homes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from miniserve.cluster.messages import Abort, Failed, Run, StepTime
from miniserve.kv.hashing import token_bytes
from miniserve.scheduler.conversation import Said
from miniserve.scheduler.prompts import Known, PrefixIndex, page_chain
from miniserve.scheduler.scheduler import NoDecoder
from miniserve.scheduler.turns import Deliver, Note, TurnState
from miniserve.states import IllegalTransition
from tests.support.scheduling import (
    PAGE,
    delivered,
    end,
    join,
    report,
    report_steps,
    run_of,
    scheduler,
    sent,
    submit,
)


def test_a_turn_goes_through_its_states_in_order() -> None:
    made = scheduler("p0", "d0", max_turns=1)
    _, run = run_of(submit(made, "t", [1] * 40))
    submit(made, "u", [2] * 40)
    turn, queued = made.turns.values()
    assert (turn.state, queued.state) == (TurnState.PREFILL, TurnState.QUEUED)
    assert (queued.run, queued.home, queued.placed) == (None, None, None)
    report(made, "p0", run.turn, 0, 7, cached_tokens=0)
    assert turn.state is TurnState.DECODE
    made.worker_down("d0", returns=True)
    assert (turn.state, turn.run, turn.home) == (TurnState.QUEUED, None, None)
    join(made, "d0", 2)
    assert (turn.state, turn.run) == (TurnState.PREFILL, "t.2")
    made.cancel("t", 1.0)
    assert (turn.state, queued.state) == (TurnState.ENDED, TurnState.PREFILL)
    for state in TurnState:
        with pytest.raises(IllegalTransition):
            turn.move(state)
    with pytest.raises(IllegalTransition):
        queued.move(TurnState.PREFILL)


def test_a_turn_that_runs_again_has_another_name() -> None:
    made = scheduler("p0", "d0", "d1")
    home, first = run_of(submit(made, "t", [1] * 40))
    assert delivered(report(made, "p0", first.turn, 0, 7)) == [("t", [7])]
    other, second = run_of(made.worker_down(home, returns=False))
    assert other != home
    assert second.turn != first.turn
    assert (second.tokens, second.prior) == ([1] * 40 + [7], 1)
    assert report(made, "p0", first.turn, 1, 8) == [], "an output of a run that is over"
    assert delivered(report(made, other, second.turn, 1, 9)) == [("t", [9])]


def test_a_worker_that_drew_another_first_token_is_set_right() -> None:
    """P gave the client a token and died with it; D computed the prompt itself and drew another one."""
    made = scheduler("p0", "d0")
    _, first = run_of(submit(made, "t", [1] * 40))
    assert delivered(report(made, "p0", first.turn, 0, 7)) == [("t", [7])]
    made.worker_down("p0", returns=False)
    commands = report(made, "d0", first.turn, 0, 8)
    assert sent(commands, Abort) == [("d0", Abort(first.turn))]
    _, second = run_of(commands)
    assert second.tokens == [1] * 40 + [7]
    assert delivered(commands) == []
    assert delivered(report(made, "d0", second.turn, 1, 3)) == [("t", [3])]
    assert made.workers["d0"].turns == 1


def test_a_late_report_of_a_prefiller_changes_nothing() -> None:
    """D has given up and computed the prompt itself; then P's report of the same run comes, with another token."""
    made = scheduler("p0", "d0")
    _, run = run_of(submit(made, "t", [1] * 40))
    assert delivered(report(made, "d0", run.turn, 0, 8)) == [("t", [8])]
    assert report(made, "p0", run.turn, 0, 7) == []
    assert delivered(report(made, "d0", run.turn, 1, 9)) == [("t", [9])]


def test_a_turn_under_which_three_workers_die_ends() -> None:
    made = scheduler("d0")
    submit(made, "bad", [1] * 40)
    ends = []
    for epoch in range(2, 5):
        ends += [c.output for c in made.worker_down("d0", returns=True) if isinstance(c, Deliver)]
        join(made, "d0", epoch)
    (output,) = ends
    assert isinstance(output, Failed)
    assert "3 workers died" in output.error
    assert len(made.turns) == 0


def test_turns_wait_for_a_decoder_that_returns() -> None:
    made = scheduler("p0", "d0")
    _, first = run_of(submit(made, "t", [1] * 40))
    assert delivered(report(made, "p0", first.turn, 0, 7)) == [("t", [7])]
    assert sent(made.worker_down("d0", returns=True), Run) == []
    assert made.can_serve
    assert sent(submit(made, "u", [2] * 40), Run) == [], "new turns wait too"
    commands = join(made, "d0", 2)
    assert [run.tokens for _, run in sent(commands, Run)] == [[1] * 40 + [7], [2] * 40]
    made.worker_down("d0", returns=True)
    ends = made.worker_down("d0", returns=False)  # it could not be started
    assert [c.turn for c in ends if isinstance(c, Deliver) and isinstance(c.output, Failed)] == ["t", "u"]
    with pytest.raises(NoDecoder):
        submit(made, "v", [3] * 40)


def test_a_stream_at_home_on_a_prefiller_outlives_the_last_decoder() -> None:
    made = scheduler("p0", "d0", policy="observe")
    found = made.conversations.find("a", token_bytes([1]), page_chain([1], "", PAGE), 0.0)[0]
    found.home = "p0"
    home, run = run_of(submit(made, "t", [1] * 40, key="a"))
    assert home == "p0"
    submit(made, "u", [2] * 40, key="b")
    commands = made.worker_down("d0", returns=False)
    assert [c.turn for c in commands if isinstance(c, Deliver)] == ["u"]
    assert delivered(end(made, "p0", run.turn)) == [("t", [5])]


def test_a_conversation_that_lives_on_a_prefiller_goes_on_while_the_decoder_is_away() -> None:
    made = scheduler("p0", "d0", policy="observe")
    found = made.conversations.find("a", token_bytes([1]), page_chain([1], "", PAGE), 0.0)[0]
    found.home = "p0"
    _, run = run_of(submit(made, "t", [1] * 40, key="a"))
    end(made, "p0", run.turn)
    made.worker_down("d0", returns=True)
    home, _ = run_of(submit(made, "u", [1] * 60, key="a"))
    assert home == "p0"


def test_a_client_cannot_take_the_name_of_another_conversation() -> None:
    made = scheduler("d0")
    _, first = run_of(submit(made, "a", [1] * 40))
    _, second = run_of(submit(made, "b", [2] * 40, key="auto-1"))
    _, third = run_of(submit(made, "c", [3] * 40, key="1"))
    for run in (first, second, third):
        end(made, "d0", run.turn)
    assert len(made.conversations) == 3
    made.on_tick(1e9)
    assert len(made.conversations) == 0
    assert made.workers["d0"].resident == 0


def test_a_conversation_is_found_by_the_key_that_it_was_given() -> None:
    """Even with a prompt that does not continue the last one, where the server itself knows."""
    made = scheduler("p0", "d0", "d1")
    home, first = run_of(submit(made, "t", [1] * 40))
    name = made.turns["t"].conversation.key
    assert isinstance(name, int)
    submit(made, "k", [3] * 40, key="mine")
    assert made.turns["k"].conversation.key == "mine"
    end(made, home, first.turn)
    assert "t" not in made.turns
    again, _ = run_of(submit(made, "u", [2] * 40, key=name, said=Said(sure=True)))
    assert (again, made.turns["u"].conversation.key) == (home, name)
    submit(made, "v", [4] * 40)
    assert made.turns["v"].conversation.key not in (name, "mine")


def test_choices_of_one_request_move_once() -> None:
    """Turns beside a first one find its KV on the way to their home: the prompt is prefilled by P once."""
    made = scheduler("p0", "d0")
    places = [run_of(submit(made, f"t{i}", [1] * 40, key="c"))[1].prefill_at for i in range(3)]
    assert places == ["p0", None, None]


def test_a_placement_elsewhere_is_a_move_and_the_new_home_fetches_the_history() -> None:
    made = scheduler("d0", "d1", policy="observe", max_turns=1)
    home, run = run_of(submit(made, "t", [1] * 40, key="a"))
    end(made, home, run.turn)
    other = {"d0": "d1", "d1": "d0"}[home]
    _, blocker = run_of(submit(made, "b", [3] * 40, key="b"))
    if made.conversations.get("b").home != home:  # fill the home of "a", not the other one
        end(made, other, blocker.turn)
        made.workers[home].change(1, 1, 0.0)
    worker, again = run_of(submit(made, "u", [1] * 60, key="a"))
    assert (worker, again.history_at) == (other, home)
    found = made.conversations.get("a")
    assert (found.home, found.moves, found.moved_at) == (other, 1, 2)


def test_a_conversation_lives_on_a_prefiller_as_on_any_worker() -> None:
    made = scheduler("p0", "d0", policy="observe", max_turns=64, max_queued=9)
    steps = [StepTime(0, 0, batch, 100 * batch, 0.02 + 0.005 * batch) for batch in (1, 2, 4, 8, 16)]
    steps += [StepTime(n, n * n // 2, 0, 0, n / 1000) for n in (64, 512)]
    for name in ("p0", "d0"):
        report_steps(made, name, *steps)
    for _ in range(16):
        made.workers["d0"].change(1, 1, 0.0)
    home, run = run_of(submit(made, "a1", [1] * 40, key="a"))
    assert (home, run.prefill_at, run.history_at) == ("p0", None, None)
    view = made.workers["p0"]
    assert (view.turns, view.reserved) == (1, 4)
    end(made, home, run.turn, 1.0)
    assert (view.turns, view.reserved, view.resident) == (0, 0, 3)
    assert view.wanted == pytest.approx(2)
    home, run = run_of(submit(made, "a2", [1] * 60, key="a", now=1.5))
    assert (home, run.prefill_at, run.history_at) == ("p0", None, None)
    assert view.wanted == 0, "it has come back"
    ((home, run),) = sent(made.worker_down("p0", returns=True, now=2.0), Run)
    assert (home, run.turn, run.history_at) == ("d0", "a2.2", None)


def test_the_home_gets_the_forecast_of_a_conversation() -> None:
    made = scheduler("d0")
    for n in range(4):
        _, run = run_of(submit(made, f"t{n}", [1] * (40 + n), key="a", now=10.0 * n))
        report(made, "d0", run.turn, 0, 5, 10.0 * n + 1, finish="stop", cached_tokens=0)
    assert run.keep.conversation == "a"
    assert run.keep.gap == 9.0
    assert 0.6 < run.keep.chance <= 1
    assert run.keep.page_seconds > 0


def test_records_are_made_only_while_notes_are_on() -> None:
    made = scheduler("p0", "d0")
    assert not [c for c in submit(made, "t", [1] * 40) if isinstance(c, Note)]
    made = scheduler("p0", "d0", policy="observe")
    made.notes = True
    commands = submit(made, "t", [1] * 40)
    (decision,) = (SimpleNamespace(**c.record) for c in commands if isinstance(c, Note))
    assert (decision.policy, decision.home, decision.tokens, decision.turn) == ("observe", "d0", 40, 1)
    assert set(decision.workers) == {"p0", "d0"}
    assert [(o.home, o.prefill_at) for o in decision.options] == [("d0", ""), ("d0", "p0"), ("p0", "")]
    assert decision.options[0].cost > 0
    _, run = run_of(commands)
    commands = report(made, "d0", run.turn, 0, 5, 2.0, finish="stop", cached_tokens=16, prefill=0.5)
    (outcome,) = (SimpleNamespace(**c.record) for c in commands if isinstance(c, Note))
    assert outcome.run == decision.run == run.turn
    assert (outcome.cached, outcome.waited, outcome.prefill, outcome.finish) == (16, 1.5, 0.5, "stop")
    assert outcome.expected_first_token == decision.options[0].first_token
    assert outcome.first_token == 2.0


def test_the_prefix_index_knows_which_workers_computed_the_beginning_of_a_prompt() -> None:
    found = PrefixIndex(capacity=8)
    chain = page_chain(list(range(160)), "", PAGE)
    found.add(chain, "d0")
    assert found.find(chain)[0] == (8, {"d0"})
    assert found.find(chain[:6])[0] == (4, {"d0"})
    found.add(chain[:4], "p0")
    known = Known(found.find(chain), PAGE)
    assert [known[name] for name in ("d0", "p0", "d1")] == [8 * PAGE, 2 * PAGE, 0]
    assert found.find(page_chain([1] * 160, "", PAGE)) == []
    found.drop("d0")
    assert found.find(chain) == [(8, set()), (4, set()), (2, {"p0"}), (1, {"p0"})]
    found.add(page_chain(list(range(500, 660)), "", PAGE), "d0")
    found.add(page_chain(list(range(900, 1060)), "", PAGE), "d0")
    assert len(found._workers) == 8
    assert found.find([]) == found.find(chain[:1]) == []


def test_a_prefiller_that_died_holds_no_prompt_when_it_returns() -> None:
    made = scheduler("p0", "d0")
    _, run = run_of(submit(made, "t", [1] * 400, key="a"))
    made.worker_down("p0", returns=True)
    join(made, "p0", 2)
    report(made, "d0", run.turn, 0, 7, cached_tokens=0)
    assert made.conversations.get("a").copy_at is None
    assert made.cluster.prefixes.find(page_chain([1] * 400, "", PAGE))[0] == (16, {"d0"})


def test_turns_of_a_lower_priority_number_are_placed_first() -> None:
    """Among those that wait; what runs goes on, and a turn that has lost its worker still goes before its equals."""
    made = scheduler("d0", max_turns=1)
    _, run = run_of(submit(made, "runs", [1] * 40))
    for name, priority in (("a", 0), ("late", 3), ("urgent", -2), ("b", 0), ("more", -2)):
        submit(made, name, [ord(name[0])] * 40, said=Said(priority=priority))
    order = []
    for _ in range(5):
        _, run = run_of(end(made, "d0", run.turn))
        order.append(run.turn.split(".")[0])
    assert order == ["urgent", "more", "a", "b", "late"]


def test_an_expected_length_counts_until_outputs_were_seen() -> None:
    made = scheduler("d0")
    submit(made, "a", [1] * 40, said=Said(osl=7))
    submit(made, "b", [2] * 40)
    assert [turn.output for turn in made.turns.values()] == [7, 16], "the other one may generate 16"
    for n in range(3):
        _, run = run_of(submit(made, f"c{n}", [3] * (40 + n * 20), key="c"))
        report(made, "d0", run.turn, 0, 7, cached_tokens=0)
        report(made, "d0", run.turn, 1, 8, finish="stop")
    submit(made, "d", [3] * 120, key="c", said=Said(osl=9))
    assert made.turns["d"].output == 2, "as observed"
