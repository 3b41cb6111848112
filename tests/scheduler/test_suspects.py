"""A request of which workers die: it ends with an error, and those beside it go on. Over made-up workers."""

from __future__ import annotations

from typing import Any

import pytest

from miniserve.cluster.messages import Abort, Failed, Run
from miniserve.scheduler.baselines import POLICIES
from miniserve.scheduler.turns import PROOF, Command, Deliver
from tests.support.scheduling import delivered, join, report, report_stopped, run_of, scheduler, sent, submit

TOKENS = 40
"""Of each answer."""


class Workers:
    """Workers that give each turn the tokens 100, 101, ..., one a round. With the token number `deadly[turn]` of a turn
    the worker dies that computes it; it comes back two rounds later."""

    def __init__(self, *names: str, policy: str, deadly: dict[str, int], **more: Any) -> None:
        self.made = scheduler(*names, policy=policy, max_queued=1000, **more)
        self.deadly = deadly
        self.runs: dict[str, dict[str, Run]] = {name: {} for name in names}
        """Worker -> name of a run -> what was sent of it."""
        self.epochs = dict.fromkeys(names, 1)
        self.absent: dict[str, int] = {}
        self.got: dict[str, list[int]] = {}
        self.errors: dict[str, str] = {}
        self.ended: dict[str, int] = {}
        """Turn -> the round in which it ended."""
        self.deaths = self.rounds = 0

    def submit(self, turn: str, tokens: list[int], key: str = "") -> None:
        self.got[turn] = []
        self.carry_out(submit(self.made, turn, tokens, key))

    def carry_out(self, commands: list[Command]) -> None:
        for home, run in sent(commands, Run):
            self.runs[home][run.turn] = run
        for home, abort in sent(commands, Abort):
            self.runs[home].pop(abort.turn, None)
        if sent(commands, Abort):
            self.carry_out(report_stopped(self.made, commands))
        for command in commands:
            if isinstance(command, Deliver):
                assert command.turn not in self.ended
                if isinstance(command.output, Failed):
                    self.errors[command.turn] = command.output.error
                else:
                    self.got[command.turn] += command.output.tokens
                if isinstance(command.output, Failed) or len(self.got[command.turn]) == TOKENS:
                    self.ended[command.turn] = self.rounds

    def round(self) -> None:
        self.rounds += 1
        for name in [name for name, since in self.absent.items() if self.rounds > since + 2]:
            del self.absent[name]
            self.epochs[name] += 1
            self.carry_out(join(self.made, name, self.epochs[name]))
        for home in list(self.runs):
            for run in list(self.runs[home].values()):
                if run.turn in self.runs[home]:
                    self.step(home, run)

    def step(self, home: str, run: Run) -> None:
        turn = run.turn.rpartition(".")[0]
        index = len(self.got[turn])
        first = index == run.prior
        worker = run.prefill_at if first and run.prefill_at and run.prefill_at not in self.absent else home
        if self.deadly.get(turn) == index:
            self.die(worker)
            return
        more: dict[str, Any] = {"cached_tokens": 0} if first else {}
        if index + 1 == TOKENS:
            more["finish"] = "length"
            del self.runs[home][run.turn]
        self.carry_out(report(self.made, worker, run.turn, index, 100 + index, **more))

    def die(self, name: str) -> None:
        self.deaths += 1
        self.runs[name].clear()
        self.absent[name] = self.rounds
        self.carry_out(self.made.worker_down(name, returns=True))

    def run(self, rounds: int) -> None:
        while len(self.ended) < len(self.got):
            self.round()
            assert self.rounds < rounds, f"{self.got.keys() - self.ended.keys()} hang"
        assert not self.made.turns
        assert all((view.turns, view.reserved) == (0, 0) for view in self.made.workers.values())


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("topology", [("d0",), ("d0", "d1"), ("p0", "d0"), ("p0", "d0", "d1")])
@pytest.mark.parametrize("deadly", [0, 1, 5], ids=["prefill", "second token", "sixth token"])
@pytest.mark.parametrize("place", [0, 3, 5], ids=["comes first", "in the middle", "comes last"])
def test_a_request_that_workers_die_of_fails_alone(
    policy: str, topology: tuple[str, ...], deadly: int, place: int
) -> None:
    workers = Workers(*topology, policy=policy, deadly={f"t{place}": deadly}, max_turns=16)
    for n in range(6):
        workers.submit(f"t{n}", [n + 1] * 40)
    workers.run(rounds=200)
    assert workers.errors.keys() == {f"t{place}"}
    assert "3 workers died" in workers.errors[f"t{place}"]
    assert workers.deaths == 3
    assert all(tokens == [*range(100, 100 + TOKENS)] for turn, tokens in workers.got.items() if turn != f"t{place}")
    assert workers.got[f"t{place}"] == [*range(100, 100 + deadly)]


def test_two_of_which_workers_die_fail_and_no_other() -> None:
    workers = Workers("d0", policy="observe", deadly={"t1": 3, "t4": 0}, max_turns=16)
    for n in range(6):
        workers.submit(f"t{n}", [n + 1] * 40)
    workers.run(rounds=300)
    assert workers.errors.keys() == {"t1", "t4"}
    assert workers.deaths == 4, "two of all, and one of each alone"


def test_turns_on_other_workers_go_on_while_suspected_ones_are_tried() -> None:
    workers = Workers("d0", "d1", policy="colocated", deadly={"t0": 2}, max_turns=4)
    for n in range(6):
        workers.submit(f"t{n}", [n + 1] * 40)
    suspects = [turn for turn in workers.made.turns.values() if turn.home == "d0"]
    for turn in suspects:
        turn.lose()  # a worker has died under them before
    while not workers.deaths:
        workers.round()
    assert [turn.suspected for turn in suspects] == [True] * 3
    for n in range(8):
        workers.submit(f"late{n}", [n + 50] * 40)
    workers.run(rounds=300)
    assert workers.errors.keys() == {"t0"}
    last = max(workers.ended[turn.id] for turn in suspects)
    assert workers.ended["late0"] < last, "d1 had room for one"


def test_a_suspected_turn_runs_beside_no_unproven_one_until_it_has_gone_on() -> None:
    made = scheduler("d0", "d1", policy="colocated", max_turns=9, max_queued=9)
    home, _ = run_of(submit(made, "a", [1] * 40, key="a"))
    for epoch in (2, 3):
        made.worker_down(home, returns=True)
        home = made.turns["a"].home or home
        for name in ("d0", "d1"):
            if name not in made.workers:
                join(made, name, epoch)
    turn = next(iter(made.turns.values()))
    assert (turn.losses, turn.suspected) == (2, True)
    assert turn.home is not None
    other = {"d0": "d1", "d1": "d0"}[turn.home]
    assert [run_of(submit(made, f"b{n}", [n + 2] * 40))[0] for n in range(3)] == [other] * 3
    for index in range(PROOF):
        assert turn.suspected
        assert delivered(report(made, turn.home, turn.run, index, 7)) == [("a", [7])]
    assert not turn.suspected
    assert run_of(submit(made, "c", [9] * 40))[0] == turn.home, "its worker takes others again"


def test_a_suspected_turn_waits_until_a_worker_is_empty_and_that_one_takes_no_other() -> None:
    made = scheduler("d0", policy="colocated", max_turns=9, max_queued=9)
    submit(made, "a", [1] * 40)
    submit(made, "b", [2] * 40)
    for epoch in (2, 3):
        made.worker_down("d0", returns=True)
        join(made, "d0", epoch)
    a, b = made.turns.values()
    assert (a.home, b.home) == ("d0", None), "one after the other"
    assert sent(submit(made, "c", [3] * 40), Run) == []
    cancelled = made.cancel("a", 0.0)
    assert sent(cancelled, Run) == [], "it may still run"
    assert [run.turn for _, run in sent(report_stopped(made, cancelled), Run)] == ["b.3"]
    assert [run.turn for _, run in sent(made.cancel("b", 0.0), Run)] == ["c.1"]


def test_a_turn_that_a_prefiller_made_suspected_leaves_its_home() -> None:
    made = scheduler("p0", "d0", policy="disaggregated", max_turns=9, max_queued=9)
    submit(made, "a", [1] * 40)
    submit(made, "b", [2] * 40)
    made.worker_down("d0", returns=True)
    join(made, "d0", 2)
    a, b = made.turns.values()
    assert (a.losses, a.prefill_at) == (1, "p0")
    commands = made.worker_down("p0", returns=True)
    assert sorted(abort.turn for _, abort in sent(commands, Abort)) == ["a.2", "b.2"]
    _, run = run_of(report_stopped(made, commands))
    assert (run.turn, run.prefill_at) == ("a.3", None), "alone on one worker"
    assert (made.workers["d0"].turns, b.home) == (1, None)


def test_each_further_death_under_a_turn_asks_for_twice_the_proof() -> None:
    """It is not what it was tried for that the worker dies of: it gets further than that each time."""
    workers = Workers("d0", policy="colocated", deadly={}, max_turns=9)
    workers.submit("a", [1] * 40)
    (turn,) = workers.made.turns.values()
    asked = []
    for _ in range(4):
        turn.lose()
        asked.append(turn.proven)
    assert asked == [0, PROOF, 2 * PROOF, 4 * PROOF]
