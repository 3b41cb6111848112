"""A cluster on a virtual clock: the server's scheduler, workers without devices, and agents that wait for answers."""

from array import array
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import count
from math import inf
from typing import Any

from miniserve.bench.replay.metrics import ConversationTimes, TurnTimes
from miniserve.bench.replay.workload import Script, Text, Workload
from miniserve.bench.simulate.hardware import Hardware
from miniserve.bench.simulate.worker import HostDisk, SimulatedWorker
from miniserve.cluster.messages import Ended, Envelope, Failed, FirstToken, Message, Report, TurnOutput
from miniserve.config import Role, Topology
from miniserve.sampling_params import SamplingParams
from miniserve.scheduler.baselines import make_policy
from miniserve.scheduler.conversation import UNSAID, Said
from miniserve.scheduler.scheduler import Scheduler
from miniserve.scheduler.turns import Command, Deliver, Send

TICK_SECONDS = 1.0


@dataclass(frozen=True, kw_only=True)
class SimulationConfig:
    """What to simulate, each by the flag of its name (`cli/commands.toml`). `hardware` is that of prefillers and of
    decoders. The share `warm_up` of the conversations is not counted: the cluster is empty then."""

    workload: Workload
    topology: Topology
    hardware: tuple[Hardware, Hardware]
    policy: str = "observe"
    mispredict: float = 0.0
    warm_up: float = 0.0
    enable_prefix_caching: bool = True
    name_groups: bool = False


@dataclass(slots=True)
class Agent:
    """Plays one script: `text` has the tokens of its conversation so far, `answer` is what the model will say in this
    turn, of which `received` tokens have come. Between turns, its gap ends at `due`; `running` counts its sub-agents by
    the turn that waits for them."""

    script: Script
    number: int
    text: Text
    times: ConversationTimes
    parent: "Agent | None"
    answer: list[int] = field(default_factory=list)
    sent: float = 0.0
    first: float = 0.0
    last: float = 0.0
    cached: int = 0
    received: int = 0
    due: float = inf
    running: Counter[int] = field(default_factory=Counter)


class Simulation:
    """Runs a workload through a cluster. `run` returns when all conversations have ended; `progress` is called at the
    end of each.

    Everything that happens is an event in one heap; events of the same moment happen in the order they were caused.
    """

    def __init__(
        self,
        config: SimulationConfig,
        progress: Callable[[], None] = lambda: None,
        worker: type[SimulatedWorker] = SimulatedWorker,
    ) -> None:
        self.now = 0.0
        self.times: list[ConversationTimes] = []
        self.gaps = array("f")
        """Seconds between two tokens of a turn, all of them."""
        self._seed, self._name_groups = config.workload.seed, config.name_groups
        self._left = len(config.workload.conversations)
        self._progress = progress
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._order = count()
        self._agents: dict[str, Agent] = {}
        prefiller, decoder = config.hardware
        policy = make_policy(config.policy, config.mispredict)
        self._latency = max(prefiller.message_seconds, decoder.message_seconds)
        self.scheduler = Scheduler(policy, prefiller.page_tokens, decoder.max_num_seqs, max_queued=2**31, kept_bytes=0)
        hosts = _hosts(config.topology, decoder.devices_per_host)
        disks = {host: HostDisk() for host in hosts.values()}
        self.workers = {
            name: worker(
                name,
                role,
                hosts[name],
                prefiller if role is Role.PREFILLER else decoder,
                self._speak,
                self._carry,
                max_model_len=max(script.tokens for script in config.workload.scripts) + 1,
                stretch=policy.step_stretch,
                caching=config.enable_prefix_caching,
                disk=disks[hosts[name]],
            )
            for name, role in config.topology.roles.items()
        }
        ups = [self.scheduler.worker_up(worker.peer) for worker in self.workers.values()]
        self._carry_out(ups[-1])  # It announces all of them to all.
        for script, start in zip(config.workload.scripts, config.workload.starts, strict=True):
            self._at(start, self._begin, script)
        self._at(TICK_SECONDS, self._tick)

    def run(self) -> None:
        while self._left:
            self.step()

    def step(self) -> None:
        self.now, _, happen, what = heappop(self._events)
        happen(*what)

    def _at(self, when: float, happen: Callable[..., None], *what: Any) -> None:
        heappush(self._events, (when, next(self._order), happen, what))

    def _tick(self) -> None:
        self._carry_out(self.scheduler.on_tick(self.now))
        self._at(self.now + TICK_SECONDS, self._tick)

    def _carry(self, sender: str, to: str, at: float, body: Message) -> None:
        """Send a message: it arrives after the latency of messages."""
        if isinstance(body, Report):
            self._at(at + self._latency, lambda: self._carry_out(self.scheduler.on_report(sender, body, self.now)))
        else:
            envelope = Envelope(sender, 1 if sender in self.workers else 0, body)
            self._at(at + self._latency, self._receive, self.workers[to], envelope)

    def _receive(self, worker: SimulatedWorker, envelope: Envelope) -> None:
        """A worker reads a message now or after its step."""
        worker.inbox.append(envelope)
        self._schedule(worker, worker.reads(self.now))

    def _schedule(self, worker: SimulatedWorker, due: float) -> None:
        if worker.due > due or worker.due <= self.now:
            worker.due = due
            self._at(due, self._work, worker)

    def _work(self, worker: SimulatedWorker) -> None:
        """A round of a worker's loop, unless an earlier one has replaced it."""
        if worker.due == self.now:
            worker.due = inf
            self._schedule(worker, worker.round(self.now))

    def _carry_out(self, commands: list[Command]) -> None:
        for command in commands:
            if isinstance(command, Deliver):
                self._deliver(command.turn, command.output)
            elif isinstance(command, Send):
                self._carry("frontend", command.worker, self.now, command.message)

    def _begin(self, script: Script, said: Iterable[int] = (), parent: Agent | None = None) -> None:
        times = ConversationTimes(script.key, self.now, parent=parent.times if parent else None)
        self.times.append(times)
        self._ask(Agent(script, len(self.times) - 1, Text(script, self._seed, said=said), times, parent))

    def _go_on(self, agent: Agent) -> None:
        """Ask if the gap is over and no sub-agent runs that the turn waits for."""
        if agent.due <= self.now and not agent.running[len(agent.times.turns)]:
            self._ask(agent)

    def _ask(self, agent: Agent) -> None:
        times, number = agent.times, len(agent.times.turns)
        size = agent.script.turns[number]
        if number:
            times.gaps += self.now - agent.last
            times.tools += size.gap
        prompt = agent.text.prompt(size)
        agent.answer = agent.text.take(size.output)
        agent.sent, agent.received, agent.cached, agent.due = self.now, 0, 0, inf
        name = f"{agent.number}.{number}"
        self._agents[name] = agent
        params = SamplingParams(temperature=0.0, max_tokens=size.output, ignore_eos=True)
        key, said = "", UNSAID
        if self._name_groups:
            key, said = times.key, Said(parent=times.parent.key if times.parent else "")
        self._carry_out(self.scheduler.submit(name, prompt, params, agent.number, key, "", self.now, said))

    def _deliver(self, turn: str, output: TurnOutput) -> None:
        agent = self._agents[turn]
        assert not isinstance(output, Failed), output.error
        if agent.received == 0:
            agent.first = self.now
        elif count := len(output.tokens):
            self.gaps.extend([(self.now - agent.last) / count] * count)
        assert output.tokens == agent.answer[agent.received : agent.received + len(output.tokens)]
        agent.received += len(output.tokens)
        agent.last = self.now
        if isinstance(output, FirstToken):
            agent.cached = output.cached_tokens
        elif isinstance(output, Ended):
            self._end(turn, agent)

    def _end(self, turn: str, agent: Agent) -> None:
        del self._agents[turn]
        turns, said = agent.times.turns, agent.text.said
        tokens = len(said), agent.cached, agent.received
        turns.append(TurnTimes(agent.sent, agent.first, agent.last, *tokens))
        said.fromlist(agent.answer)
        for script in agent.script.agents:
            if script.after == len(turns) - 1:
                agent.running[script.until] += 1
                self._at(self.now + script.turns[0].gap, self._begin, script, said[: script.prefix], agent)
        if len(turns) < len(agent.script.turns):
            agent.due = self.now + agent.script.turns[len(turns)].gap
            self._at(agent.due, self._go_on, agent)
            return
        del said[:]  # sub-agents that still run hold it
        self._left -= 1
        self._progress()
        if agent.parent:
            agent.parent.running[agent.script.until] -= 1
            self._go_on(agent.parent)

    def _speak(self, run: str, said: int, count: int) -> list[int]:
        return self._agents[run.rpartition(".")[0]].answer[said : said + count]


def _hosts(topology: Topology, devices: int | None) -> dict[str, str]:
    """The host of each worker: workers of each role are spread evenly over as few hosts as have enough devices."""
    count = -(-len(topology.roles) // devices) if devices else 1
    sizes = {Role.PREFILLER: topology.prefillers, Role.DECODER: topology.decoders}
    return {name: f"h{int(name[1:]) * count // sizes[role]}" for name, role in topology.roles.items()}
