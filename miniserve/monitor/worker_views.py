"""What GET /v1/workers shows: the scheduler's views of the workers, and the links between them."""

from typing import Any, Literal, TypeVar, cast

from typing_extensions import TypedDict

from miniserve.cluster.messages import WorkerStats
from miniserve.scheduler.scheduler import Scheduler
from miniserve.scheduler.workers import Link, WorkerView

T = TypeVar("T")


class Kv(TypedDict):
    """Pages of a worker. `free` hold nothing, `cached` a prefix that no turn uses, `held` are in use; `reserved` is
    what the scheduler has promised to turns, `resident` what conversations between turns are thought to hold."""

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


def card(kind: type[T], /, *sources: object, **own: Any) -> T:
    """A `kind`: each field that is not among `own` is that of its name in the first of the sources that has it."""

    def value(name: str) -> Any:
        return own[name] if name in own else next(getattr(source, name) for source in sources if hasattr(source, name))

    return cast(T, {name: value(name) for name in kind.__annotations__})


def worker_list(scheduler: Scheduler, policy: str, now: float) -> WorkerList:
    workers = [_worker(view, now) for view in scheduler.workers.values()]
    links = [_link(source, destination, link) for (source, destination), link in scheduler.links.items()]
    return card(WorkerList, scheduler, object="list", policy=policy, data=workers, links=links)


def _link(source: str, destination: str, link: Link) -> LinkCard:
    rate = link.bandwidth.value if link.bandwidth.count else None
    own = {"source": source, "destination": destination, "moves": link.count, "exposed": link.exposed.value}
    return card(LinkCard, link, **own, bandwidth=rate)


def _worker(view: WorkerView, now: float) -> WorkerCard:
    speed = view.speed
    # A worker that has not reported yet is untouched.
    stats = view.stats or WorkerStats(view.total_pages, view.total_pages, 0, 0, 0, 0, 0, 0)
    pages = {"total": view.total_pages, "free": stats.free_pages, "cached": stats.cached_pages}
    return card(
        WorkerCard,
        view,
        stats,
        role=view.role.value,
        last_heard=now - view.reported if view.stats else None,
        load=view.load.value,
        prefilling=view.prefilling.value,
        kv=card(Kv, view, stats, **pages, held=stats.held_pages, host_used=stats.host_pages),
        rates={
            "prefill_512": speed.prefill(512) if speed.prefills.measured else None,
            "prefill_2048": speed.prefill(2048) if speed.prefills.measured else None,
            "decode_step": speed.decode(max(view.turns, 1), view.tokens_in_use) if speed.decodes.measured else None,
        },
    )
