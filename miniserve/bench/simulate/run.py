"""One simulated run: its figures, what the same conversations take alone, and what any scheduler could do with them."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from miniserve.bench.replay.metrics import SLO, ConversationTimes, Latency, seconds, summary
from miniserve.bench.replay.workload import Script
from miniserve.bench.simulate.cluster import Simulation, SimulationConfig
from miniserve.bench.simulate.hardware import Hardware


def simulate(config: SimulationConfig, progress: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """The result object of the contract (docs/evaluation.md)."""
    simulation = Simulation(config, progress)
    simulation.run()
    scheduler, workers, workload = simulation.scheduler, simulation.workers, config.workload
    links = scheduler.links.values()
    duration = simulation.now - min(workload.starts)
    hardware = config.hardware[0 if config.topology.prefillers else 1]
    standalone = {script.key: alone(script, hardware) for script in workload.conversations}
    first = workload.starts[min(int(config.warm_up * len(workload.starts)), len(workload.starts) - 1)]
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
        "placements": scheduler.placed,
        "moves": sum(c.moves for c in scheduler.conversations),
        "preemptions": sum(w.worker.engine.counters.preemptions for w in workers.values()),
        "busy": {name: worker.busy / duration for name, worker in workers.items()},
        "energy": _energy(simulation, duration),
    }


def steady(times: Iterable[ConversationTimes], start: float, end: float, bound: float) -> dict[str, float] | None:
    """Conversations a second that ended between the first and last counted arrival, and their share of the bound."""
    if end <= start:
        return None
    rate = sum(start <= one.turns[-1].last < end for one in times) / (end - start)
    return {"conversations_per_s": rate, "bound_share": rate / bound}


def alone(script: Script, hardware: Hardware) -> Latency:
    """What a conversation takes alone on an idle worker: all its steps, also for what it shares with its parent."""
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


def bound(scripts: Sequence[Script], workers: Sequence[Hardware], prefillers: int) -> dict[str, Any]:
    """What a workload and the hardware let any scheduler do: conversations a second, none of them late in steady state.
    A bound, not a goal: it takes every prompt for found in a cache as far as it was there before, every batch for as
    large as its step may take, no worker for idle. Means of `scripts` on `workers`, the first ones are `prefillers`.

    `compute`: a step of at most `SLO` times that of a lone stream spends `overhead` and `base` on no sequence; what is
    left of all workers' time bears so many times the device seconds that a conversation needs, each at the worker that
    needs fewest. `memory`: a conversation holds its tokens for as long as a turn takes alone, and no longer. The lower
    one is `conversations_per_s`. `links` binds only those who move each first prompt once: the prefillers' links.
    """
    kinds = [[_work(script, hardware) for script in scripts] for hardware in dict.fromkeys(workers)]
    seconds = {name: min(sum(one[name] for one in each) / len(scripts) for each in kinds) for name in kinds[0][0]}
    held = seconds.pop("token_seconds")
    shares = [1 - (w.base + w.overhead) / (SLO * w.step_seconds((), 1, 0)) for w in workers]
    compute, memory = sum(shares) / sum(seconds.values()), sum(w.kv_tokens for w in workers) / held
    first = sum(script.turns[0].new for script in scripts) / len(scripts)
    rates = [1 / w.transfer_seconds(round(first / w.page_tokens)) for w in workers[:prefillers]]
    return {
        "conversations_per_s": min(compute, memory),
        "compute": compute,
        "memory": memory,
        "links": sum(rates) if rates else None,
        "device_seconds": seconds,
    }


def _work(script: Script, hardware: Hardware) -> dict[str, float]:
    """What a conversation takes of a device beyond the constants of steps, by kind, and of its memory."""
    lone, each = hardware.step_seconds((), 1, 0), hardware.per_sequence
    work = dict.fromkeys(("first_prefill", "appends", "decode", "token_seconds"), 0.0)
    length = script.prefix  # which its parent has computed
    for number, turn in enumerate(script.turns):
        count, before = turn.new, min(length, turn.keep)
        prefill = hardware.per_token * count + hardware.per_pair * count * (before + count / 2)
        work["appends" if number else "first_prefill"] += prefill + hardware.per_context * before
        length = before + count + turn.output
        read = (turn.output - 1) * (before + count + turn.output / 2)  # the sum of its lengths at each token but one
        work["decode"] += each * (turn.output - 1) + hardware.per_kv_token * read
        work["token_seconds"] += prefill * (before + count) + lone * read
    return work


def _energy(simulation: Simulation, duration: float) -> dict[str, float] | None:
    """The key `energy` of the contract, None where a profile has no watts. Tokens of `tokens_per_joule` are those of
    all prompts, found in a cache or not, and all outputs: as the paper counts, by the size of its figures."""
    joules = 0.0
    for worker in simulation.workers.values():
        busy, idle = worker.hardware.busy_watts, worker.hardware.idle_watts
        if not busy or idle is None:
            return None
        joules += worker.busy * busy + max(duration - worker.busy, 0.0) * idle
    turns = [turn for times in simulation.times for turn in times.turns]
    output, every = sum(turn.output for turn in turns), sum(turn.prompt + turn.output for turn in turns)
    return {"joules": joules, "tokens_per_joule": every / joules, "output_tokens_per_joule": output / joules}
