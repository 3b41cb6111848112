"""What GET /conversations and GET /v1/workers show, and events about turns: the scheduler's own records, in words. Each
is a card: JSON that has a schema in `views.toml`, which OpenAPI shows too."""

from collections.abc import Callable
from itertools import islice
from operator import attrgetter
from typing import Any

from miniserve.cluster.messages import WorkerStats
from miniserve.config import tables
from miniserve.scheduler.conversation import FINISHES, Conversation, TurnRecord
from miniserve.scheduler.scheduler import Scheduler
from miniserve.scheduler.turns import Turn, TurnState
from miniserve.scheduler.workers import WorkerView

SCHEMAS = tables("monitor/views.toml")
SOURCES = {
    kind: {name: schema.pop("of", name) for name, schema in table["properties"].items()}
    for kind, table in SCHEMAS.items()
}
"""Which attribute each property of a card shows."""
Card = dict[str, Any]
MOST_LISTED = 1000
"""Conversations in one answer; the latest come first."""


def card(kind: str, /, *sources: object, **own: Any) -> Card:
    """A `kind` of views.toml: properties that are not among `own` are those of the first source that has them."""

    def found(path: str) -> Any:
        first = path.partition(".")[0]
        return attrgetter(path)(next(source for source in sources if hasattr(source, first)))

    return {name: own[name] if name in own else found(path) for name, path in SOURCES[kind].items()}


def conversation_list(scheduler: Scheduler, now: float, limit: int) -> Card:
    turns = _running_turns(scheduler)
    latest = scheduler.conversations.latest(min(limit, MOST_LISTED))
    data = [_card(scheduler, conversation, turns.get(id(conversation), []), now) for conversation in latest]
    return {"object": "list", "total": len(scheduler.conversations), "data": data}


def conversation_detail(
    scheduler: Scheduler, misses: Callable[[str | int], list[Card]], key: str, now: float
) -> Card | None:
    """One of them; None if it is not known (any more)."""
    number = int(key) if key.isascii() and key.isdigit() and len(key) < 20 else None
    found = scheduler.conversations.get(key) or (None if number is None else scheduler.conversations.get(number))
    if found is None:
        return None
    turns = _running_turns(scheduler).get(id(found), [])
    return {
        **_card(scheduler, found, turns, now),
        "misses": misses(found.key),
        "history": [_turn(record, scheduler.names) for record in found.history],
        "running": [_running(turn, now) for turn in turns],
    }


def live_turns(scheduler: Scheduler, now: float) -> Card:
    """The turns that wait or run, those that came first of them first."""
    data = [_running(turn, now) for turn in islice(scheduler.turns.values(), MOST_LISTED)]
    return {"time": now, "total": len(scheduler.turns), "conversations": len(scheduler.conversations), "data": data}


def _running_turns(scheduler: Scheduler) -> dict[int, list[Turn]]:
    """By the identity of conversations: their turns that wait or run."""
    turns: dict[int, list[Turn]] = {}
    for turn in scheduler.turns.values():
        turns.setdefault(id(turn.conversation), []).append(turn)
    return turns


def _card(scheduler: Scheduler, conversation: Conversation, turns: list[Turn], now: float) -> Card:
    parent, group, by = conversation.parent, conversation.group, conversation.by
    before = scheduler.conversations.get(parent or 0)
    # It is a part of the one that it began like only if that waited, and has had another turn since.
    if by == "prefix" and not (before is not None and (before.active or before.last_end > conversation.began)):
        parent, group, by = None, conversation.key, ""
    kind = "main" if parent is None else "fork" if by == "key" else "sub-agent"
    placed = [turn for turn in turns if turn.state is not TurnState.QUEUED]
    return card(
        "ConversationCard",
        conversation,
        id=str(conversation.key),
        object="conversation",
        kind="side" if scheduler.conversations.is_side(conversation) else kind,
        group=str(group),
        parent=None if parent is None else str(parent),
        by=by,
        state="running" if placed else "queued" if turns else "idle",
        kv_pages=conversation.resident + sum(turn.pages for turn in placed),
        age=now - conversation.began,
        idle=0.0 if conversation.active else now - conversation.last_end,
    )


def _turn(record: TurnRecord, names: list[str]) -> Card:
    return card(
        "TurnCard",
        record,
        after_tool=bool(record.tool),
        home=names[record.home],
        prefill_at=names[record.home if record.prefill_at is None else record.prefill_at],
        finish=FINISHES[record.finish],
        phases=card("TurnPhases", record),
    )


def _running(turn: Turn, now: float) -> Card:
    # A turn that runs again decodes, as its client sees it.
    state = "queued" if turn.state is TurnState.QUEUED else "decode" if turn.delivered else "prefill"
    own = {"state": state, "conversation": str(turn.conversation.key), "age": now - turn.arrived}
    return card("RunningTurn", turn, **own, prefill_at=turn.prefill_at or turn.home)


def worker_list(scheduler: Scheduler, now: float) -> Card:
    workers = [_worker(view, now) for view in scheduler.workers.values()]
    links = []
    for (source, destination), link in scheduler.links.items():
        rate = link.bandwidth.value if link.bandwidth.count else None
        links.append(card("LinkCard", link, source=source, destination=destination, bandwidth=rate))
    return card("WorkerList", scheduler, object="list", data=workers, links=links)


def _worker(view: WorkerView, now: float) -> Card:
    speed = view.speed
    # A worker that has not reported yet is untouched.
    stats = view.stats or WorkerStats(view.total_pages, view.total_pages, 0, 0, 0, 0, 0, 0)
    return card(
        "WorkerCard",
        view,
        stats,
        last_heard=now - view.reported if view.stats else None,
        kv=card("Kv", view, stats),
        rates={
            "prefill_512": speed.prefill(512) if speed.prefills.count else None,
            "prefill_2048": speed.prefill(2048) if speed.prefills.count else None,
            "decode_step": speed.decode(max(view.turns, 1), view.tokens_in_use) if speed.decodes.count else None,
        },
    )
