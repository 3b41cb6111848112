"""A cluster on a virtual clock: the server's scheduler, workers without devices, and agents that wait for answers."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import count
from typing import Any

import msgspec

from miniserve.bench.replay.metrics import TaskTimes, TurnTimes
from miniserve.bench.replay.workload import Task, Text
from miniserve.bench.simulate.hardware import Hardware
from miniserve.bench.simulate.worker import SimulatedWorker
from miniserve.cluster.messages import Envelope, Message, Prefill, Report, Run, TurnOutput
from miniserve.config import Topology
from miniserve.sampling_params import SamplingParams
from miniserve.scheduler.commands import Command, Deliver, Send
from miniserve.scheduler.placement import Policy
from miniserve.scheduler.scheduler import Scheduler
from miniserve.worker.sequence import Sequence

TICK_SECONDS = 1.0
"""How often the scheduler is told that time has passed."""
MAX_QUEUED = 2**31


@dataclass(slots=True)
class Agent:
    """Plays one task: `says` are the tokens of its conversation so far, `answer` what the model will say."""

    task: Task
    number: int
    text: Text
    times: TaskTimes
    says: array[int] = field(default_factory=lambda: array("i"))
    answer: list[int] = field(default_factory=list)
    sent: float = 0.0
    first: float = 0.0
    last: float = 0.0
    cached: int = 0
    heard: int = 0


class Simulation:
    """Runs `tasks`, which come at `starts` (seconds), through a cluster. `run` returns when all have ended.

    Everything that happens is an event in one heap; events of the same moment happen in the order they were caused.
    """

    def __init__(
        self,
        tasks: list[Task],
        starts: list[float],
        topology: Topology,
        hardware: tuple[Hardware, Hardware],
        policy: Policy,
        *,
        seed: int = 0,
        policy_name: str = "",
        caching: bool = True,
        record: bool = False,
        progress: Callable[[int], None] = lambda done: None,
    ) -> None:
        """`hardware` is that of prefillers and of decoders; `progress` hears how many conversations have ended."""
        self.now = 0.0
        self.times: list[TaskTimes] = []
        self.gaps = array("f")
        """Seconds between two tokens of a turn, all of them."""
        self._tasks = tasks
        self._seed = seed
        self._done = 0
        self._progress = progress
        self._events: list[tuple[float, int, Callable[[Any], None], Any]] = []
        self._order = count()
        self._agents: dict[str, Agent] = {}
        self._latency = max(h.message_seconds for h in hardware)
        longest = max(task.tokens for task in tasks) + 1
        page_tokens = hardware[0].page_tokens
        self.scheduler = Scheduler(policy, page_tokens, hardware[1].max_num_seqs, MAX_QUEUED, policy_name=policy_name)
        self.workers: dict[str, SimulatedWorker] = {}
        for name in topology.workers:
            self.workers[name] = SimulatedWorker(
                name,
                hardware[0] if name.startswith("p") else hardware[1],
                self._speak,
                self._carry,
                max_model_len=max(longest, 2),
                stretch=policy.step_stretch,
                caching=caching,
                record=record,
            )
        for name, worker in self.workers.items():
            self._carry_out(self.scheduler.worker_up(worker.peer, role=topology.role(name), now=0.0))
        for number, start in enumerate(starts):
            self._at(start, self._arrive, number)
        self._at(TICK_SECONDS, self._tick, None)

    def run(self) -> None:
        """Until all conversations have ended."""
        while self._done < len(self._tasks):
            self.step()

    def step(self) -> None:
        """The next event."""
        self.now, _, happen, what = heappop(self._events)
        happen(what)

    # --- events -----------------------------------------------------------------------------------------------------

    def _at(self, when: float, happen: Callable[[Any], None], what: Any) -> None:
        heappush(self._events, (when, next(self._order), happen, what))

    def _tick(self, _: None) -> None:
        self._carry_out(self.scheduler.on_tick(self.now))
        self._at(self.now + TICK_SECONDS, self._tick, None)

    def _carry(self, sender: str, to: str, at: float, body: Message) -> None:
        """A message is under way."""
        if isinstance(body, Run | Prefill):
            body = msgspec.structs.replace(body, tokens=list(body.tokens))  # as it is now
        happen = self._report if to == "frontend" else self._hear
        self._at(at + self._latency, happen, (to, Envelope(sender, 1 if sender in self.workers else 0, body)))

    def _hear(self, what: tuple[str, Envelope]) -> None:
        """A message has come to a worker, which wakes up or is told after its step."""
        to, envelope = what
        worker = self.workers[to]
        worker.inbox.append(envelope)
        self._schedule(worker, max(self.now, worker.clock.now))

    def _schedule(self, worker: SimulatedWorker, due: float) -> None:
        if worker.due > due or worker.due <= self.now:
            worker.due = due
            self._at(due, self._work, worker)

    def _work(self, worker: SimulatedWorker) -> None:
        """A worker's turn, if nothing has called it earlier."""
        if worker.due == self.now:
            worker.due = -1.0
            self._schedule(worker, worker.round(self.now))

    def _report(self, what: tuple[str, Envelope]) -> None:
        envelope = what[1]
        assert isinstance(envelope.body, Report)
        self._carry_out(self.scheduler.on_report(envelope.sender, envelope.body, self.now))

    def _carry_out(self, commands: list[Command]) -> None:
        for command in commands:
            if isinstance(command, Deliver):
                self._deliver(command.turn, command.output)
            elif isinstance(command, Send):
                self._carry("frontend", command.worker, self.now, command.message)

    # --- agents -----------------------------------------------------------------------------------------------------

    def _arrive(self, number: int) -> None:
        task = self._tasks[number]
        times = TaskTimes(task.key, self.now)
        self.times.append(times)
        agent = Agent(task, number, Text(task, self._seed), times)
        self._ask(agent)

    def _ask(self, agent: Agent) -> None:
        """The next turn."""
        number = len(agent.times.turns)
        size = agent.task.turns[number]
        agent.says.extend(agent.text.take(size.new))
        agent.answer = agent.text.take(size.output)
        agent.sent, agent.heard, agent.cached = self.now, 0, 0
        name = f"{agent.number}.{number}"
        self._agents[name] = agent
        params = SamplingParams(temperature=0.0, max_tokens=size.output, ignore_eos=True)
        self._carry_out(self.scheduler.submit(name, agent.says.tolist(), params, agent.number, "", "", self.now))

    def _deliver(self, turn: str, output: TurnOutput) -> None:
        """The next tokens have come."""
        agent = self._agents[turn]
        assert output.finish != "error", output.error
        if agent.heard == 0:
            agent.first = self.now
        else:
            self.gaps.append(self.now - agent.last)
        assert output.tokens == agent.answer[agent.heard : agent.heard + len(output.tokens)]
        agent.heard += len(output.tokens)
        agent.last = self.now
        agent.cached = output.cached_tokens or agent.cached
        if output.finish:
            self._end(turn, agent)

    def _end(self, turn: str, agent: Agent) -> None:
        del self._agents[turn]
        times, turns = agent.times, agent.task.turns
        times.turns.append(TurnTimes(agent.sent, agent.first, agent.last, len(agent.says), agent.cached, agent.heard))
        agent.says.extend(agent.answer)
        if len(times.turns) == len(turns):
            self._done += 1
            self._progress(self._done)
            return
        gap = turns[len(times.turns)].gap
        times.gaps += gap
        self._at(self.now + gap, self._ask, agent)

    def _speak(self, sequence: Sequence) -> int:
        """What the model says next in this turn."""
        return self._agents[sequence.turn.rpartition(".")[0]].answer[sequence.num_outputs]
