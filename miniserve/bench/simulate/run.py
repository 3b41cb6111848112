"""One simulated run: its figures, and what the same conversations take alone."""

from collections.abc import Callable, Iterable
from typing import Any

from miniserve.bench.replay.metrics import ConversationTimes, Latency, energy, seconds, summary
from miniserve.bench.replay.workload import Script
from miniserve.bench.simulate.bound import bound
from miniserve.bench.simulate.cluster import Simulation, SimulationConfig
from miniserve.bench.simulate.hardware import Hardware
from miniserve.bench.simulate.worker import SimulatedWorker


def simulate(config: SimulationConfig, progress: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """The result object of the contract (docs/evaluation.md)."""
    simulation = Simulation(config, progress)
    simulation.run()
    scheduler, workers, workload = simulation.scheduler, simulation.workers, config.workload
    links = scheduler.links.values()
    duration = simulation.now - min(workload.starts)
    hardware = config.hardware[0 if config.topology.prefillers else 1]
    standalone = {script.key: alone(script, hardware) for script in workload.conversations}
    first = workload.starts[int(config.warm_up * len(workload.starts))]
    counted = [times for times in simulation.times if times.arrival >= first]
    most = bound(workload.conversations, [worker.hardware for worker in workers.values()], config.topology.prefillers)
    return {
        "policy": config.policy,
        "topology": str(config.topology),
        "hardware": ",".join(dict.fromkeys(hardware.name for hardware in config.hardware)),
        "rate": workload.rate,
        "seed": workload.seed,
        "mispredict": config.mispredict,
        "warm_up": config.warm_up,
        **summary(counted, standalone, simulation.now - first),
        "steady_state": steady(simulation.times, first, max(workload.starts), most["conversations_per_s"]),
        "bound": most,
        "token_gap_s": seconds(simulation.gaps),
        "kv_transfer": {"bytes": sum(link.bytes for link in links), "seconds": sum(link.seconds for link in links)},
        "placements": {f"{a}->{b}" if a != b else a: n for (a, b), n in sorted(scheduler.placements.items())},
        "moves": sum(c.moves for c in scheduler.conversations),
        "preemptions": sum(w.worker.engine.counters.preemptions for w in workers.values()),
        "busy": {name: worker.busy / duration for name, worker in workers.items()},
        "energy": _energy(workers.values(), duration, simulation.times),
    }


def steady(times: Iterable[ConversationTimes], start: float, end: float, bound: float) -> dict[str, float] | None:
    """Conversations a second that ended between the first counted arrival and the last one, and the share of the bound
    that they are; None where there is no such time."""
    if end <= start:
        return None
    rate = sum(start <= one.turns[-1].last < end for one in times) / (end - start)
    return {"conversations_per_s": rate, "bound_share": rate / bound}


def alone(script: Script, hardware: Hardware) -> Latency:
    """What a conversation takes alone on an idle worker: the sum of its steps, as the engine would make them. What it
    shares with its parent is computed too."""
    page, budget, steps = hardware.page_tokens, hardware.max_num_batched_tokens, hardware.step_seconds
    ttft: list[float] = []
    length, known, total, tbt = script.prefix, 0, 0.0, None
    for turn in script.turns:
        # The KV of the last token is not there yet, and only full pages are found again.
        done = min(known, turn.keep) // page * page
        length = min(length, turn.keep) + turn.new
        first = 2 * hardware.message_seconds
        while done < length:
            count = min(budget, length - done)
            # To the engine a single token that is left is a decode.
            first += steps([(count, done)], 0, 0) if length - done > 1 else steps((), 1, length)
            done += count
        decode = sum(steps((), 1, length + n) for n in range(1, turn.output))
        length += turn.output
        known = length - 1
        ttft.append(first)
        total += first + decode
        tbt = decode / (turn.output - 1) if turn.output > 1 else None
    return Latency(tuple(ttft), total - decode, tbt, total)


def _energy(
    workers: Iterable[SimulatedWorker], duration: float, times: list[ConversationTimes]
) -> dict[str, float | None]:
    joules = 0.0
    for worker in workers:
        busy, idle = worker.hardware.busy_watts, worker.hardware.idle_watts
        if busy is None or idle is None:
            return energy(None, times)
        joules += worker.busy * busy + max(duration - worker.busy, 0.0) * idle
    return energy(joules, times)
