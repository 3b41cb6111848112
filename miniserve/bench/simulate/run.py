"""One simulated run: what to simulate, and the figures that came of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from miniserve.bench.replay.metrics import Latency, TaskTimes, energy, seconds, summary
from miniserve.bench.replay.workload import Task
from miniserve.bench.simulate.cluster import Simulation
from miniserve.bench.simulate.hardware import Hardware
from miniserve.bench.simulate.worker import SimulatedWorker
from miniserve.config import Topology
from miniserve.scheduler.baselines import make_policy


@dataclass(frozen=True, kw_only=True)
class Setting:
    """`tasks` come at `starts` (seconds) to a cluster of `topology`; `hardware` is that of prefillers and decoders."""

    tasks: list[Task]
    starts: list[float]
    topology: Topology
    hardware: tuple[Hardware, Hardware]
    policy: str = "observe"
    mispredict: float = 0.0
    rate: float | None = None
    seed: int = 0
    window: tuple[float, float] | None = None
    """Seconds of which a timeline is wanted."""
    caching: bool = True
    """Whether workers find KV of known prefixes."""


def simulate(
    setting: Setting,
    standalone: dict[str, Latency] | None = None,
    progress: Callable[[int], None] = lambda done: None,
) -> dict[str, Any]:
    """The result object of the contract (docs/evaluation.md). `standalone` is what `alone_all` says of the tasks, if it
    is known already. With `setting.window` it has a `timeline` too."""
    simulation = Simulation(
        setting.tasks,
        setting.starts,
        setting.topology,
        setting.hardware,
        make_policy(setting.policy, setting.mispredict),
        seed=setting.seed,
        caching=setting.caching,
        record=setting.window is not None,
        progress=progress,
    )
    simulation.run()
    scheduler, workers = simulation.scheduler, simulation.workers
    duration = simulation.now - min(setting.starts)
    if standalone is None:
        standalone = alone_all(setting.tasks, setting.hardware[0 if setting.topology.prefillers else 1])
    result = {
        "policy": setting.policy,
        "topology": str(setting.topology),
        "hardware": ",".join(dict.fromkeys(hardware.name for hardware in setting.hardware)),
        "rate": setting.rate,
        "seed": setting.seed,
        "mispredict": setting.mispredict,
        **summary(simulation.times, standalone, duration),
        "token_gap_s": seconds(simulation.gaps),
        "kv_transfer": {
            "bytes": sum(link.bytes for link in scheduler.links.values()),
            "seconds": sum(link.seconds for link in scheduler.links.values()),
        },
        "placements": {f"{a}->{b}" if a != b else a: n for (a, b), n in sorted(scheduler.placements.items())},
        "moves": sum(c.moves for c in scheduler.conversations),
        "preemptions": sum(w.worker.engine.counters.preemptions for w in workers.values()),
        "busy": {name: worker.runner.busy / duration for name, worker in workers.items()},
        "energy": _energy(list(workers.values()), duration, simulation.times),
    }
    if setting.window is not None:
        result["timeline"] = _timeline(setting, simulation)
    return result


def alone(task: Task, hardware: Hardware) -> Latency:
    """What a conversation takes alone on an idle worker: the sum of its steps, as the engine would make them."""
    page, budget = hardware.page_tokens, hardware.max_num_batched_tokens
    ttft: list[float] = []
    length, total, tbt = 0, 0.0, None
    for turn in task.turns:
        # The KV of the last token was not computed, and only full pages are found again.
        done = max(length - 1, 0) // page * page
        length += turn.new
        first = 2 * hardware.message_seconds
        while done < length:
            count = min(budget, length - done)
            # A single token that is left is a decode to the engine.
            first += hardware.step_seconds([(count, done)], 0, 0) if length - done > 1 else _decode(hardware, length)
            done += count
        decode = sum(_decode(hardware, length + n) for n in range(1, turn.output))
        length += turn.output
        ttft.append(first)
        total += first + decode
        tbt = decode / (turn.output - 1) if turn.output > 1 else None
    return Latency(tuple(ttft), total - decode, tbt, total)


def alone_all(tasks: list[Task], hardware: Hardware) -> dict[str, Latency]:
    """`alone` of each task, by its key."""
    return {task.key: alone(task, hardware) for task in tasks}


def _decode(hardware: Hardware, length: int) -> float:
    return hardware.step_seconds((), 1, length)


def _energy(workers: list[SimulatedWorker], duration: float, times: list[TaskTimes]) -> dict[str, float | None]:
    """Joules of all workers over the run, from their busy and idle watts, and what `tokens_per_joule` makes of it."""
    joules = 0.0
    for worker in workers:
        hardware, busy = worker.hardware, worker.runner.busy
        if hardware.busy_watts is None or hardware.idle_watts is None:
            return energy(None, times)
        joules += busy * hardware.busy_watts + max(duration - busy, 0.0) * hardware.idle_watts
    return energy(joules, times)


def _timeline(setting: Setting, simulation: Simulation) -> dict[str, Any]:
    """What workers did in the window, for `plots.draw_timeline`."""
    assert setting.window is not None
    start, end = setting.window
    kv = {name: [row for row in worker.kv if start <= row[0] <= end] for name, worker in simulation.workers.items()}
    return {
        "policy": setting.policy,
        "topology": str(setting.topology),
        "rate": setting.rate,
        "window": [start, end],
        "spans": {
            name: [list(span) for span in (*worker.spans, *worker.copies) if span[1] > start and span[0] < end]
            for name, worker in simulation.workers.items()
            if worker.spans is not None
        },
        "kv": {
            name: {
                "time": [row[0] for row in rows],
                "held": [row[1] for row in rows],
                "cached": [row[2] for row in rows],
                "total": simulation.workers[name].pool.num_pages,
            }
            for name, rows in kv.items()
        },
    }
