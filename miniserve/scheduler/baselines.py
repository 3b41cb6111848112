"""The rules of others, to compare with, and the list of all policies; miniserve's own one is in `observe.py`."""

from collections.abc import Callable
from hashlib import blake2b

from miniserve.config import Role
from miniserve.scheduler.observe import Observe
from miniserve.scheduler.placement import Need, Option, Placement, Policy
from miniserve.scheduler.workers import Cluster, WorkerView


def at_home(need: Need, cluster: Cluster) -> WorkerView | None:
    """The decoder of the turn: home, or for a conversation without one the decoder with the most free KV that fits."""
    home = cluster.worker(need.conversation.home)
    # A home that is a prefiller is another policy's.
    candidates = cluster.decoders if home is None else [home] if home.role is Role.DECODER else []
    fitting = [d for d in candidates if d.name in cluster.open and d.fits(need.pages)]
    return max(fitting, key=lambda d: d.free, default=None)


def least_queued(cluster: Cluster) -> WorkerView:
    return min(cluster.prefillers, key=lambda p: p.queued_prefill_tokens)


class Colocated(Policy):
    """Every turn is prefilled and decoded at home: what a cluster of ordinary servers with sticky routing does."""

    def place(self, need: Need, cluster: Cluster) -> Placement | None:
        home = at_home(need, cluster)
        return Placement(Option(home.name), "home") if home else None


class Disaggregated(Policy):
    """Every turn is prefilled by a prefiller, the one that has most of it cached, and moves to its decoder: full
    disaggregation as in DistServe (arXiv 2401.09670), with prefix caching on both sides. What the decoder has stays
    there; the prefiller computes again what the decoder has generated."""

    def place(self, need: Need, cluster: Cluster) -> Placement | None:
        home = at_home(need, cluster)
        if home is None or not cluster.prefillers:
            return Placement(Option(home.name), "no prefiller") if home else None
        prefiller = max(cluster.prefillers, key=lambda p: (need.known[p.name], -p.queued_prefill_tokens))
        return Placement(Option(home.name, prefiller.name), "every turn")


class Conserve(Policy):
    """The paper's rule (arXiv 2606.01839): the first turn is prefilled by a prefiller and its KV moves once to the
    decoder with the most free KV; the rest stays there."""

    def place(self, need: Need, cluster: Cluster) -> Placement | None:
        home = at_home(need, cluster)
        if home is None:
            return None
        # Where the home has died the conversation begins anew. A turn that comes beside the first waits for
        # the KV that is on its way to the home.
        if need.conversation.home or not cluster.prefillers:
            return Placement(Option(home.name), "later turn" if need.conversation.home else "no prefiller")
        return Placement(Option(home.name, least_queued(cluster).name), "first turn")


class Ampd(Policy):
    """AMPD's rule (arXiv 2602.14516): the first turn goes to a prefiller. A later one goes wherever its first token is
    expected earlier: at home, `T_local = Q_d + T_pre(hist, new)`, or at a prefiller, `T_remote = Q_p + T_kv(hist, d->p)
    + T_pre(hist, new) + T_kv(new, p->d)`. AMPD takes T from an offline profile, we from what was measured.

    `mispredict` is the share of later turns, drawn by a hash, where the decision is turned around.
    """

    def __init__(self, mispredict: float = 0.0) -> None:
        self._mispredict = mispredict

    def place(self, need: Need, cluster: Cluster) -> Placement | None:
        conversation, home = need.conversation, at_home(need, cluster)
        if home is None:
            return None
        if not cluster.prefillers:
            return Placement(Option(home.name), "no prefiller")
        if not conversation.home:
            return Placement(Option(home.name, least_queued(cluster).name), "first turn")
        history = need.known[home.name]
        local = Option(home.name, queue=home.queue_seconds, prefill=home.speed.prefill(need.new(home.name), history))
        remote = [self._remote(need, cluster, home, p) for p in cluster.prefillers_for(home, need.known)]
        best = min(remote, key=lambda option: option.first_token)
        away = best.first_token < local.first_token
        wrong = _draw(f"{conversation.key}:{conversation.turns}") < self._mispredict
        reason = "mispredicted" if wrong else "earlier first token"
        return Placement(best if away != wrong else local, reason, (local, *remote), share_history=True)

    def _remote(self, need: Need, cluster: Cluster, home: WorkerView, p: WorkerView) -> Option:
        here, there = need.known[home.name], need.known[p.name]
        history = max(here, there)
        moved = cluster.copy_seconds(home, p, here - there) + cluster.copy_seconds(p, home, need.tokens - here)
        prefill = p.speed.prefill(max(need.tokens - history, 1), history)
        return Option(home.name, p.name, queue=p.queue_seconds, prefill=prefill, transfer=moved)


def _draw(text: str) -> float:
    """A number in [0, 1) that looks random and is the same for the same text."""
    return int.from_bytes(blake2b(text.encode(), digest_size=6).digest(), "big") / 2**48


POLICIES: dict[str, Callable[[], Policy]] = {
    "colocated": Colocated,
    "disaggregated": Disaggregated,
    "ampd": Ampd,
    "conserve": Conserve,
    "observe": Observe,
}


def make_policy(name: str, mispredict: float = 0.0) -> Policy:
    return Ampd(mispredict) if name == "ampd" else POLICIES[name]()
