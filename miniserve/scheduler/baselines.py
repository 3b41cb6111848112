"""The rules of others, to compare with, and the list of all policies; miniserve's own one is in `observe.py`."""

import math
from collections.abc import Callable
from hashlib import blake2b

from miniserve.config import Role
from miniserve.scheduler.observe import Observe, away
from miniserve.scheduler.placement import Need, Option, Placement, Policy
from miniserve.scheduler.workers import Cluster, WorkerView

MOST_UNCACHED, MOST_UNCACHED_SHARE = 2048, 0.7
"""Tokens, and the share of a prompt, below both of which `Threshold` prefills at home."""
FEW_APPENDED = 512
"""New tokens below which `Ppd` prefills a later turn at home."""
MATCH_SHARE, LOAD_GAP, LOAD_RATIO = 0.3, 64, 1.5
"""Of `CacheAware`: `--cache-threshold`, `--balance-abs-threshold` and `--balance-rel-threshold` as the documents of SMG
have them, the gateway of SGLang (github.com/lightseekorg/smg)."""
SESSION_SECONDS = 300.0
"""How long `Affinity` keeps a session where it was: our choice, and how long Anthropic's prompt cache lasts."""


def at_home(need: Need, cluster: Cluster) -> WorkerView | None:
    """The decoder of the turn: home, or for a conversation without one the decoder with the most free KV that fits."""
    home = cluster.worker(need.conversation.home)
    # A home that is a prefiller is another policy's.
    fitting = [d for d in _fitting(need, cluster) if home is None or d is home]
    return max(fitting, key=lambda d: d.free, default=None)


def least_queued(cluster: Cluster) -> WorkerView:
    return min(cluster.prefillers, key=lambda p: p.queued_prefill_tokens)


class Colocated(Policy):
    """Every turn is prefilled and decoded at home: what a cluster of ordinary servers with sticky routing does."""

    def place(self, need: Need, cluster: Cluster) -> Placement | None:
        home = at_home(need, cluster)
        return Placement(Option(home.name), "home") if home else None


class Prefilling(Policy):
    """A policy whose turns decode at home, and are prefilled where `prefill` says if there is any prefiller."""

    def place(self, need: Need, cluster: Cluster) -> Placement | None:
        home = at_home(need, cluster)
        if home is None or not cluster.prefillers:
            return Placement(Option(home.name), "no prefiller") if home else None
        return self.prefill(need, cluster, home)

    def prefill(self, need: Need, cluster: Cluster, home: WorkerView) -> Placement:
        """Place a turn that `home` decodes; there are prefillers."""
        raise NotImplementedError


class Disaggregated(Prefilling):
    """Every turn is prefilled by a prefiller, the one that has most of it cached, and moves to its decoder: full
    disaggregation as in DistServe (arXiv 2401.09670), with prefix caching on both sides. What the decoder has stays
    there; the prefiller computes again what the decoder has generated."""

    def prefill(self, need: Need, cluster: Cluster, home: WorkerView) -> Placement:
        prefiller = max(cluster.prefillers, key=lambda p: (need.known[p.name], -p.queued_prefill_tokens))
        return Placement(Option(home.name, prefiller.name), "every turn")


class Conserve(Prefilling):
    """The paper's rule (arXiv 2606.01839): the first turn is prefilled by a prefiller and its KV moves once to the
    decoder with the most free KV; the rest stays there."""

    def prefill(self, need: Need, cluster: Cluster, home: WorkerView) -> Placement:
        # Where the home has died the conversation begins anew. A turn that comes beside the first waits for
        # the KV that is on its way to the home.
        if need.conversation.home:
            return Placement(Option(home.name), "later turn")
        return Placement(Option(home.name, least_queued(cluster).name), "first turn")


class Ampd(Prefilling):
    """AMPD's rule (arXiv 2602.14516): the first turn goes to a prefiller. A later one goes wherever its first token is
    expected earlier: at home, `T_local = Q_d + T_pre(hist, new)`, or at a prefiller, `T_remote = Q_p + T_kv(hist, d->p)
    + T_pre(hist, new) + T_kv(new, p->d)`. AMPD takes T from an offline profile, we from what was measured. `mispredict`
    is the share of later turns, drawn by a hash, where the decision is turned around."""

    def __init__(self, mispredict: float = 0.0) -> None:
        self._mispredict = mispredict

    def prefill(self, need: Need, cluster: Cluster, home: WorkerView) -> Placement:
        conversation = need.conversation
        if not conversation.home:
            return Placement(Option(home.name, least_queued(cluster).name), "first turn")
        history = need.known[home.name]
        local = Option(home.name, queue=home.queue_seconds, prefill=home.speed.prefill(need.new(home.name), history))
        remote = [self._remote(need, cluster, home, p) for p in cluster.prefillers_for(home, need.known)]
        best = min(remote, key=lambda option: option.first_token)
        away = best.first_token < local.first_token
        drawn = blake2b(f"{conversation.key}:{conversation.turns}".encode(), digest_size=6).digest()
        wrong = int.from_bytes(drawn, "big") / 2**48 < self._mispredict
        reason = "mispredicted" if wrong else "earlier first token"
        return Placement(best if away != wrong else local, reason, (local, *remote), share_history=True)

    def _remote(self, need: Need, cluster: Cluster, home: WorkerView, p: WorkerView) -> Option:
        new, known, history, back = away(need, cluster, home, p)
        prefill = p.speed.prefill(new, known)
        return Option(home.name, p.name, queue=p.queue_seconds, prefill=prefill, transfer=history + back)


class Threshold(Prefilling):
    """By uncached tokens: the decoder first, as llm-d chooses (its `pd-profile-handler`); then a prefiller too, unless
    fewer than `MOST_UNCACHED` tokens and `MOST_UNCACHED_SHARE` of the prompt are not cached at the decoder, which is
    NVIDIA Dynamo's conditional disaggregation by effective input length."""

    def prefill(self, need: Need, cluster: Cluster, home: WorkerView) -> Placement:
        new = need.new(home.name)
        if new < MOST_UNCACHED and new < MOST_UNCACHED_SHARE * need.tokens:
            return Placement(Option(home.name), "little is uncached")
        return Placement(Option(home.name, least_queued(cluster).name), "much is uncached", share_history=True)


class Ppd(Prefilling):
    """PPD's rule (arXiv 2603.13358): the first turn goes to a prefiller. A later one with fewer than `FEW_APPENDED` new
    tokens stays at home; a longer one goes where the relative loss of TTFT and of TPOT is less, both with weight 1. PPD
    reads them from a table that it has measured beforehand, without queues; we from what was measured until now."""

    def prefill(self, need: Need, cluster: Cluster, home: WorkerView) -> Placement:
        prefiller = least_queued(cluster)
        local, remote = Option(home.name), Option(home.name, prefiller.name)
        if not need.conversation.home:
            return Placement(remote, "first turn")
        appended, before = need.new(home.name), need.known[home.name]
        if appended < FEW_APPENDED:
            return Placement(local, "a short append")
        new, known, history, back = away(need, cluster, home, prefiller)
        step = home.speed.decode(home.turns + 1, home.tokens_in_use + need.tokens)
        ttft = (prefiller.speed.prefill(new, known) + history + back) / max(home.speed.prefill(appended, before), 1e-9)
        tpot = 1 + home.speed.held_up(appended, before) / max(need.output * step, 1e-9)
        return Placement(remote if ttft < tpot else local, "by the table", share_history=True)


class Moving(Policy):
    """A policy whose turns may leave their home for any decoder that has room."""

    def elsewhere(self, worker: WorkerView) -> float:
        if worker.role is Role.PREFILLER or worker.turns >= worker.max_turns:
            return 0.0
        return worker.total_pages - worker.reserved if worker.turns else math.inf


class Affinity(Moving):
    """Sessions stay where they were, for `SESSION_SECONDS` after a turn, as with a router's session affinity (NVIDIA
    Dynamo's, or Continuum's time to live, arXiv 2511.02230, with one time for all). Each turn is prefilled there; a
    session that comes later, or is new, goes to the decoder with the most free KV."""

    def place(self, need: Need, cluster: Cluster) -> Placement | None:
        of = need.conversation
        if of.active > 1 or need.now - need.waited - of.last_end <= SESSION_SECONDS:
            home = at_home(need, cluster)
            return Placement(Option(home.name), "in its session") if home else None
        home = max(_fitting(need, cluster), key=lambda d: d.free, default=None)
        return Placement(Option(home.name), "the session has ended") if home else None


class CacheAware(Moving):
    """The rule of SGLang's router (`cache_aware`) over colocated workers: the shortest queue while loads differ by more
    than `LOAD_GAP` turns and `LOAD_RATIO`; else the worker that has cached the most of the prompt, if that is more than
    `MATCH_SHARE`; else the one that has cached the least of all. It sends where we would wait for room; turns of one
    conversation that run at the same time stay together here."""

    def place(self, need: Need, cluster: Cluster) -> Placement | None:
        fitting, loads = _fitting(need, cluster), [d.turns for d in cluster.decoders] or [0]
        if need.conversation.active > 1 and need.conversation.home:
            home, reason = at_home(need, cluster), "beside others of its conversation"
        elif max(loads) - min(loads) > LOAD_GAP and max(loads) > LOAD_RATIO * min(loads):
            home, reason = min(fitting, key=lambda d: d.turns, default=None), "the shortest queue"
        else:
            best = max(cluster.decoders, key=lambda d: need.known[d.name], default=None)
            if best is not None and need.known[best.name] > MATCH_SHARE * need.tokens:
                home, reason = best if best in fitting else None, "the most of it cached"
            else:
                home, reason = max(fitting, key=lambda d: d.free, default=None), "the least cached"
        return Placement(Option(home.name), reason) if home else None


def _fitting(need: Need, cluster: Cluster) -> list[WorkerView]:
    return [d for d in cluster.decoders if d.name in cluster.open and d.fits(need.pages)]


POLICIES: dict[str, Callable[[], Policy]] = {
    "colocated": Colocated,
    "disaggregated": Disaggregated,
    "ampd": Ampd,
    "conserve": Conserve,
    "threshold": Threshold,
    "ppd": Ppd,
    "affinity": Affinity,
    "cache-aware": CacheAware,
    "observe": Observe,
}


def make_policy(name: str, mispredict: float = 0.0) -> Policy:
    policy = Ampd(mispredict) if name == "ampd" else POLICIES[name]()
    policy.name = name
    return policy
