"""The scheduler's ledger and its word to clients, without workers: reports are made up."""

from __future__ import annotations

import pytest

from miniserve.cluster.messages import Abort, Message, Peer, PoolInfo, Report, Run, TurnOutput, WorkerStats
from miniserve.sampling import SamplingParams
from miniserve.scheduler.policies import POLICIES
from miniserve.scheduler.scheduler import Command, Deliver, NoDecoder, QueueIsFull, Scheduler, Send

PAGE = 16
STATS = WorkerStats(100, 100, 0, 0, 0, 0, 0, 0)


def scheduler(*workers: str, policy: str = "conserve", max_turns: int = 4, max_queued: int = 4) -> Scheduler:
    made = Scheduler(POLICIES[policy](), PAGE, max_turns, max_queued)
    for name in workers:
        made.worker_up(Peer(name, 1, name, PoolInfo(1, 1, 100, 1, "")), prefiller=name.startswith("p"))
    return made


def submit(made: Scheduler, turn: str, tokens: list[int], key: str = "", now: float = 0.0) -> list[Command]:
    return made.submit(turn, tokens, SamplingParams(max_tokens=16), 0, key, "", now)


def sent(commands: list[Command], kind: type) -> list[tuple[str, Message]]:
    return [(c.worker, c.message) for c in commands if isinstance(c, Send) and isinstance(c.message, kind)]


def run_of(commands: list[Command]) -> tuple[str, Run]:
    ((worker, run),) = sent(commands, Run)
    return worker, run


def tell(made: Scheduler, worker: str, run: str, index: int, token: int, now: float = 0.0, **more) -> list[Command]:
    return made.on_report(worker, Report([TurnOutput(run, index, [token], **more)], [], STATS), now)


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
    assert [c.turn for c in ends if isinstance(c, Deliver) and c.output.finish == "error"] == ["t", "u"]
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
    assert output.finish == "error"
    assert "3 workers died" in output.error
    assert made.active == 0
