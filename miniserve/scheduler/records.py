"""Records of a turn: what was decided and on what grounds, what came of it, and what its conversation remembers."""

from typing import Any

from miniserve.scheduler.forecast import FINISHES, TurnEnd, TurnRecord
from miniserve.scheduler.placement import Need, Placement
from miniserve.scheduler.turns import Turn
from miniserve.scheduler.workers import Cluster

Record = dict[str, Any]
"""A `Decision` or an `Outcome` of monitor/views.toml, which says what is in it: a line of the decision log."""
READ = "free", "reserved", "turns", "queued_prefill_tokens"
"""What of a worker's view is in a decision as it is."""


def decision(policy: str, turn: Turn, need: Need, placement: Placement, cluster: Cluster) -> Record:
    """Of a turn that was placed."""
    workers = {
        w.name: {name: getattr(w, name) for name in READ}
        | {"load": w.load.value, "prefilling": w.prefilling.value, "known": need.known[w.name]}
        for w in (*cluster.prefillers, *cluster.decoders)
    }
    return {
        "kind": "decision",
        "time": need.now,
        "run": f"{turn.id}.{turn.runs + 1}",
        "conversation": turn.conversation.key,
        "turn": turn.number,
        "group": turn.conversation.group,
        "parent": turn.conversation.parent,
        "said": turn.said,
        "policy": policy,
        "tokens": need.tokens,
        "expected_output": need.output,
        "pages": need.pages,
        "queued": need.now - turn.arrived,
        "workers": workers,
        "options": placement.options,
        **{name: getattr(placement.option, name) for name in ("home", "prefill_at", "history_at")},
        "reason": placement.reason,
    }


def outcome(turn: Turn, finish: TurnEnd, now: float) -> Record:
    """Of a turn that has ended and was placed at least once."""
    placed, first, waited = _times(turn, now)
    return {
        "kind": "outcome",
        "time": now,
        "run": f"{turn.id}.{turn.runs}",
        "conversation": turn.conversation.key,
        "turn": turn.number,
        "finish": finish,
        "runs": turn.runs,
        "tokens": turn.given,
        "output": turn.delivered,
        "expected_first_token": turn.chosen.first_token if turn.chosen else None,
        "first_token": first - placed,
        "waited": waited,
        "decode": now - first,
        **vars(turn.phases),
    }


def remembered(turn: Turn, names: list[str], finish: TurnEnd, now: float) -> TurnRecord:
    """Of a turn that has ended on a worker, for its conversation's history. `names` are all workers, in the order of
    their numbers."""
    assert turn.home is not None
    placed, first, waited = _times(turn, now)
    return TurnRecord(
        turn=turn.number,
        arrived=turn.arrived - turn.conversation.began,
        gap=turn.gap,
        prompt=turn.given,
        new=turn.given - turn.known,
        output=turn.delivered,
        queued=placed - turn.arrived,
        waited=waited,
        first_token=first - turn.arrived,
        decode=now - first,
        home=names.index(turn.home),
        prefill_at=names.index(turn.prefill_at) if turn.prefill_at else None,
        tool=turn.said.tool_result,
        runs=turn.runs,
        finish=FINISHES.index(finish),
        **vars(turn.phases),
    )


def _times(turn: Turn, now: float) -> tuple[float, float, float]:
    """When it was placed, when its first token came (`now` if none has), and the seconds between these in which its
    prompt was not computed."""
    assert turn.placed is not None
    first = now if turn.first_token is None else turn.first_token
    return turn.placed, first, max(first - turn.placed - turn.phases.prefill, 0.0)
