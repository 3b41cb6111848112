"""What a workload and the hardware let any scheduler do: conversations a second, none of them late in steady state.

A bound, not a goal: it takes every prompt for found in a cache as far as it was there before, every batch for as large
as its step may take, and no worker for idle.
"""

from collections.abc import Sequence
from typing import Any

from miniserve.bench.replay.metrics import SLO
from miniserve.bench.replay.workload import Script
from miniserve.bench.simulate.hardware import Hardware


def bound(scripts: Sequence[Script], workers: Sequence[Hardware], prefillers: int) -> dict[str, Any]:
    """Means over `scripts` on these `workers`, of which the first ones are `prefillers`.

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
