"""What GET /v1/workers shows: the scheduler's views of the workers, and the links between them."""

from miniserve.cluster.messages import WorkerStats
from miniserve.monitor.views import Card, card
from miniserve.scheduler.scheduler import Scheduler
from miniserve.scheduler.workers import Link, WorkerView


def worker_list(scheduler: Scheduler, policy: str, now: float) -> Card:
    workers = [_worker(view, now) for view in scheduler.workers.values()]
    links = [_link(source, destination, link) for (source, destination), link in scheduler.links.items()]
    return card("WorkerList", scheduler, object="list", policy=policy, data=workers, links=links)


def _link(source: str, destination: str, link: Link) -> Card:
    rate = link.bandwidth.value if link.bandwidth.count else None
    own = {"source": source, "destination": destination, "moves": link.count, "exposed": link.exposed.value}
    return card("LinkCard", link, **own, bandwidth=rate)


def _worker(view: WorkerView, now: float) -> Card:
    speed = view.speed
    # A worker that has not reported yet is untouched.
    stats = view.stats or WorkerStats(view.total_pages, view.total_pages, 0, 0, 0, 0, 0, 0)
    pages = {"total": view.total_pages, "free": stats.free_pages, "cached": stats.cached_pages}
    return card(
        "WorkerCard",
        view,
        stats,
        role=view.role.value,
        last_heard=now - view.reported if view.stats else None,
        load=view.load.value,
        prefilling=view.prefilling.value,
        kv=card("Kv", view, stats, **pages, held=stats.held_pages, host_used=stats.host_pages),
        rates={
            "prefill_512": speed.prefill(512) if speed.prefills.measured else None,
            "prefill_2048": speed.prefill(2048) if speed.prefills.measured else None,
            "decode_step": speed.decode(max(view.turns, 1), view.tokens_in_use) if speed.decodes.measured else None,
        },
    )
