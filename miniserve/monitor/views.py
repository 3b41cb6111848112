"""What GET /v1/conversations and /v1/workers show: the scheduler's own records, in words."""

from __future__ import annotations

from typing import Literal

from typing_extensions import TypedDict

from miniserve.scheduler.conversations import Conversation
from miniserve.scheduler.history import FINISHES, TurnRecord
from miniserve.scheduler.scheduler import Scheduler
from miniserve.scheduler.turns import Turn
from miniserve.scheduler.workers import WorkerView

MOST_LISTED = 1000
"""Conversations in one answer; the latest come first."""


class ConversationCard(TypedDict):
    """A conversation in a list. Times are in seconds, lengths in tokens."""

    id: str
    object: Literal["conversation"]
    state: Literal["running", "queued", "idle"]
    home: str | None
    turns: int
    tokens: int
    kv_pages: int
    moves: int
    edits: int
    age: float
    idle: float


class ConversationList(TypedDict):
    """`total` are known; `data` are the latest of them."""

    object: Literal["list"]
    total: int
    data: list[ConversationCard]


class Phases(TypedDict):
    """Where a turn's time went, in seconds: `queued` for a placement, `waited` at its workers, `prefill`, which make up
    the time to the `first_token`, and `decode`. Beside these, `transfer` is the copying of KV, of which `exposed` was
    not hidden behind the prefill."""

    queued: float
    waited: float
    prefill: float
    transfer: float
    exposed: float
    first_token: float
    decode: float


class TurnCard(TypedDict):
    """A turn that has ended. `gap` is the time since the turn before, null for the first one; `after_tool` is whether
    it brought a tool's result; `runs` is above 1 if workers died under it."""

    turn: int
    arrived: float
    gap: float | None
    after_tool: bool
    prompt_tokens: int
    new_tokens: int
    cached_tokens: int
    output_tokens: int
    home: str
    prefill_at: str
    moved_pages: int
    runs: int
    finish: str
    phases: Phases


class RunningTurn(TypedDict):
    """A turn that waits or runs now."""

    request: str
    state: Literal["queued", "prefill", "decode"]
    age: float
    prompt_tokens: int
    output_tokens: int
    home: str | None
    prefill_at: str | None


class LiveTurn(TypedDict):
    """A turn that waits or runs now, among all of them. Its times are by the clock of decisions, null for what was not
    yet."""

    request: str
    conversation: str
    turn: int
    state: Literal["queued", "prefill", "decode"]
    arrived: float
    placed: float | None
    first_token: float | None
    prompt_tokens: int
    output_tokens: int
    home: str | None
    prefill_at: str | None


class LiveTurns(TypedDict):
    """`total` wait or run at `time`; `data` are the first of them. `conversations` are known."""

    time: float
    total: int
    conversations: int
    data: list[LiveTurn]


class ConversationDetail(ConversationCard):
    """One conversation: its last turns, and those that run."""

    history: list[TurnCard]
    running: list[RunningTurn]


class Kv(TypedDict):
    """Pages of a worker. `free` hold nothing, `cached` a prefix nobody uses, `held` are in use; `reserved` is what the
    scheduler has promised to turns, `resident` what conversations between turns are thought to hold."""

    total: int
    free: int
    cached: int
    held: int
    reserved: int
    resident: int
    page_bytes: int
    host_total: int
    host_used: int


class Rates(TypedDict):
    """What was measured of a worker, in seconds: prompts of 512 and 2,048 tokens, and a decode step as it is now; null
    before there was any."""

    prefill_512: float | None
    prefill_2048: float | None
    decode_step: float | None


class WorkerCard(TypedDict):
    """A worker that lives. Times are in seconds."""

    name: str
    role: Literal["prefiller", "decoder"]
    epoch: int
    last_heard: float | None
    turns: int
    load: float
    running: int
    waiting: int
    queued_prefill_tokens: int
    prefilling: float
    preemptions: int
    leases: int
    kv: Kv
    rates: Rates


class LinkCard(TypedDict):
    """KV that went from `source` to `destination`. `bandwidth` is in bytes a second, null before any went."""

    source: str
    destination: str
    moves: int
    bytes: int
    seconds: float
    exposed: float
    bandwidth: float | None


class WorkerList(TypedDict):
    """The workers that live, and the ways between them."""

    object: Literal["list"]
    policy: str
    queued: int
    data: list[WorkerCard]
    links: list[LinkCard]


def conversation_list(scheduler: Scheduler, now: float, limit: int) -> ConversationList:
    """The `limit` latest conversations."""
    turns = _running_turns(scheduler)
    latest = scheduler.conversations.latest(min(limit, MOST_LISTED))
    return {
        "object": "list",
        "total": len(scheduler.conversations),
        "data": [_card(conversation, turns.get(id(conversation), []), now) for conversation in latest],
    }


def conversation_detail(scheduler: Scheduler, key: str, now: float) -> ConversationDetail | None:
    """One of them; None if it is not known (any more)."""
    number = int(key) if key.isascii() and key.isdigit() and len(key) < 20 else None
    found = scheduler.conversations.get(key) or (None if number is None else scheduler.conversations.get(number))
    if found is None:
        return None
    turns = _running_turns(scheduler).get(id(found), [])
    return {
        **_card(found, turns, now),
        "history": [_turn(record, scheduler.names) for record in found.history],
        "running": [_running(turn, now) for turn in turns],
    }


def worker_list(scheduler: Scheduler, policy: str, now: float) -> WorkerList:
    """All workers that live."""
    links = scheduler.links.items()
    return {
        "object": "list",
        "policy": policy,
        "queued": scheduler.queued,
        "data": [_worker(view, now) for view in scheduler.workers.values()],
        "links": [
            {
                "source": source,
                "destination": destination,
                "moves": link.count,
                "bytes": link.bytes,
                "seconds": link.seconds,
                "exposed": link.exposed.value,
                "bandwidth": link.bandwidth.value if link.bandwidth.count else None,
            }
            for (source, destination), link in links
        ],
    }


def live_turns(scheduler: Scheduler, now: float) -> LiveTurns:
    """The turns that wait or run, those that came first of them first."""
    return {
        "time": now,
        "total": scheduler.active,
        "conversations": len(scheduler.conversations),
        "data": [_live(turn) for turn in scheduler.turns[:MOST_LISTED]],
    }


def _running_turns(scheduler: Scheduler) -> dict[int, list[Turn]]:
    """By the identity of conversations: their turns that wait or run."""
    turns: dict[int, list[Turn]] = {}
    for turn in scheduler.turns:
        turns.setdefault(id(turn.conversation), []).append(turn)
    return turns


def _card(conversation: Conversation, turns: list[Turn], now: float) -> ConversationCard:
    placed = [turn for turn in turns if turn.home]
    return {
        "id": str(conversation.key),
        "object": "conversation",
        "state": "running" if placed else "queued" if turns else "idle",
        "home": conversation.home or None,
        "turns": conversation.turns,
        "tokens": conversation.tokens,
        "kv_pages": conversation.resident + sum(turn.pages for turn in placed),
        "moves": conversation.moves,
        "edits": conversation.edits,
        "age": now - conversation.began,
        "idle": 0.0 if conversation.active else now - conversation.last_end,
    }


def _turn(record: TurnRecord, names: list[str]) -> TurnCard:
    return {
        "turn": record.turn,
        "arrived": record.arrived,
        "gap": record.gap if record.gap >= 0 else None,
        "after_tool": bool(record.tool),
        "prompt_tokens": record.prompt,
        "new_tokens": record.new,
        "cached_tokens": record.cached,
        "output_tokens": record.output,
        "home": names[record.home],
        "prefill_at": names[record.prefill_at if record.prefill_at >= 0 else record.home],
        "moved_pages": record.moved_pages,
        "runs": record.runs,
        "finish": FINISHES[record.finish],
        "phases": {
            "queued": record.queued,
            "waited": record.waited,
            "prefill": record.prefill,
            "transfer": record.transfer,
            "exposed": record.exposed,
            "first_token": record.first_token,
            "decode": record.decode,
        },
    }


def _live(turn: Turn) -> LiveTurn:
    return {
        "request": turn.id,
        "conversation": str(turn.conversation.key),
        "turn": turn.number,
        "state": _state(turn),
        "arrived": turn.arrived,
        "placed": turn.placed if turn.runs else None,
        "first_token": turn.first_token or None,
        "prompt_tokens": turn.given,
        "output_tokens": turn.delivered,
        "home": turn.home or None,
        "prefill_at": turn.prefill_at or turn.home or None,
    }


def _state(turn: Turn) -> Literal["queued", "prefill", "decode"]:
    return "queued" if not turn.home else "decode" if turn.delivered else "prefill"


def _running(turn: Turn, now: float) -> RunningTurn:
    return {
        "request": turn.id,
        "state": _state(turn),
        "age": now - turn.arrived,
        "prompt_tokens": turn.given,
        "output_tokens": turn.delivered,
        "home": turn.home or None,
        "prefill_at": turn.prefill_at or turn.home or None,
    }


def _worker(view: WorkerView, now: float) -> WorkerCard:
    stats = view.stats
    held = stats.held_pages if stats else 0
    return {
        "name": view.name,
        "role": "prefiller" if view.prefiller else "decoder",
        "epoch": view.epoch,
        "last_heard": now - view.heard if stats else None,
        "turns": view.turns,
        "load": view.load.value,
        "running": stats.running if stats else 0,
        "waiting": stats.waiting if stats else 0,
        "queued_prefill_tokens": view.queued_prefill_tokens,
        "prefilling": view.prefilling.value,
        "preemptions": stats.preemptions if stats else 0,
        "leases": stats.leases if stats else 0,
        "kv": {
            "total": view.total_pages,
            "free": stats.free_pages if stats else view.total_pages,
            "cached": stats.cached_pages if stats else 0,
            "held": held,
            "reserved": view.reserved,
            "resident": view.resident,
            "page_bytes": view.page_bytes,
            "host_total": stats.host_total if stats else 0,
            "host_used": stats.host_pages if stats else 0,
        },
        "rates": {
            "prefill_512": view.speed.prefill(512) if view.speed.knows_prefill else None,
            "prefill_2048": view.speed.prefill(2048) if view.speed.knows_prefill else None,
            "decode_step": view.speed.decode(max(view.turns, 1), view.tokens_in_use)
            if view.speed.knows_decode
            else None,
        },
    }
