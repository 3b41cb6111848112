"""Records of a turn: what was decided and on what grounds, what came of it, and what its conversation remembers."""

import msgspec

from miniserve.scheduler.conversation import Said
from miniserve.scheduler.forecast import FINISHES, TurnEnd, TurnRecord
from miniserve.scheduler.placement import Need, Option, Placement
from miniserve.scheduler.turns import Turn
from miniserve.scheduler.workers import Cluster


class WorkerRead(msgspec.Struct, frozen=True):
    """What a decision read of one worker, in pages of KV, tokens and seconds."""

    free: int
    reserved: int
    turns: int
    load: float
    queued_prefill_tokens: int
    prefilling: float
    known: int
    """Tokens of the prompt that it is thought to hold."""


class Decision(msgspec.Struct, frozen=True, tag="decision", tag_field="kind"):
    """A turn was placed. `time` is in seconds of the scheduler's clock; `run` names this run of the turn. The names of
    workers are "" as in `Placement`."""

    time: float
    run: str
    conversation: str | int
    turn: int
    group: str | int
    parent: str | int | None
    said: Said
    policy: str
    tokens: int
    expected_output: int
    pages: int
    queued: float
    workers: dict[str, WorkerRead]
    options: tuple[Option, ...]
    home: str
    prefill_at: str
    history_at: str
    reason: str


class Outcome(msgspec.Struct, frozen=True, tag="outcome", tag_field="kind"):
    """A turn has ended (`finish`: stop, length, abort, error). `expected_first_token` is that of the chosen option,
    None where the policy estimates nothing; `first_token` is the time from the decision on."""

    time: float
    run: str
    conversation: str | int
    turn: int
    finish: str
    runs: int
    tokens: int
    cached: int
    output: int
    expected_first_token: float | None
    first_token: float
    waited: float
    prefill: float
    transfer: float
    exposed: float
    decode: float
    moved_pages: int


Record = Decision | Outcome


def decision(policy: str, turn: Turn, need: Need, placement: Placement, cluster: Cluster) -> Decision:
    workers = {
        w.name: WorkerRead(
            free=w.free,
            reserved=w.reserved,
            turns=w.turns,
            load=w.load.value,
            queued_prefill_tokens=w.queued_prefill_tokens,
            prefilling=w.prefilling.value,
            known=need.known.get(w.name, 0),
        )
        for w in (*cluster.prefillers, *cluster.decoders)
    }
    return Decision(
        time=need.now,
        run=f"{turn.id}.{turn.runs + 1}",
        conversation=turn.conversation.key,
        turn=turn.number,
        group=turn.conversation.group,
        parent=turn.conversation.parent,
        said=turn.said,
        policy=policy,
        tokens=need.tokens,
        expected_output=need.output,
        pages=need.pages,
        queued=need.now - turn.arrived,
        workers=workers,
        options=placement.options,
        home=placement.home,
        prefill_at=placement.prefill_at,
        history_at=placement.history_at,
        reason=placement.reason,
    )


def outcome(turn: Turn, finish: TurnEnd, now: float) -> Outcome:
    """Of a turn that has ended and was placed at least once."""
    placed, first, waited = _times(turn, now)
    return Outcome(
        time=now,
        run=f"{turn.id}.{turn.runs}",
        conversation=turn.conversation.key,
        turn=turn.number,
        finish=finish,
        runs=turn.runs,
        tokens=turn.given,
        output=turn.delivered,
        expected_first_token=turn.chosen.first_token if turn.chosen else None,
        first_token=first - placed,
        waited=waited,
        decode=now - first,
        **vars(turn.phases),
    )


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
        tool=turn.tool,
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
