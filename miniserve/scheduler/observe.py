"""miniserve's own policy: the place with the least delay for all turns together, by what was observed."""

from collections.abc import Callable
from itertools import islice

from miniserve.config import Role
from miniserve.scheduler.placement import Need, Option, Placement, Policy
from miniserve.scheduler.workers import Cluster, WorkerView

MARGIN_SHARE, MARGIN_SECONDS = 0.1, 0.02
"""By how much another place must be cheaper before a prompt leaves its home: estimates are not better than that."""
AWAY_SECONDS = 0.1
"""The same for a later turn, whose history would have to travel too."""
PATIENCE = 0.25
"""By how much later a later turn's first token may come elsewhere than at home, whatever that spares others."""
ROOM = 0.1
"""The share of its pages that a worker must have room for after it has become a home: conversations grow."""
WORTH = 8.0
"""A newcomer without room waits so many times what it would cost all to compute again what it drives out. Once would be
right if that happened once; it happens at each turn of all that then share too little room."""
MOST_PREFILLING = 0.75
"""A larger share of a worker's time that prompts took says little about what comes."""
STEP_STRETCH = 6.0
"""Of `Policy.step_stretch`. Where streams are many, a step takes half of that without any prompt."""
FEW_HOMES, LIKELY_HOMES, SPECIAL_HOMES = 8, 16, 4
"""Of more workers than that, some are compared as homes: those where a turn of about this length would cost least, and
the best of those that hold most of the prompt, or are on the old home's host; of these as many with prefillers."""
TYPICAL_OUTPUT = 256
"""Tokens that such a turn generates."""


def away(need: Need, cluster: Cluster, home: WorkerView, prefiller: WorkerView) -> tuple[int, int, float, float]:
    """A prefill away from home: tokens that it computes, tokens before these, and the seconds of the copies it takes:
    of what only home has of the history to the prefiller, and back of what home does not have."""
    here, there = need.known[home.name], need.known[prefiller.name]
    known = max(here, there)
    history = cluster.copy_seconds(home, prefiller, here - there)
    return max(need.tokens - known, 1), known, history, cluster.copy_seconds(prefiller, home, need.tokens - here)


class Observe(Policy):
    """The cheapest place by the sum of all delays, in seconds: those of this turn (queue, prefill, transfer of KV,
    decode) and those that it causes to the streams beside it.

    A prompt computed at home holds up each stream there for as long as it takes. A prompt computed at a prefiller holds
    up no stream at home, but waits for other prompts there, and its KV has to travel. So small prompts and those that
    find an idle home stay; long prompts beside many streams leave. The number of streams is the mean over the last half
    minute, or how many there are now, if that is more.

    Every worker may be a home. Steps count as longer by the share of a worker's time that prompts take, whatever its
    role: a prefiller is a home like others while few prompts come, and a decoder is none for more streams while it
    computes prompts of its own.

    A newcomer (a turn whose conversation has no home) waits while no worker has room: beside what runs there, room is
    kept for conversations that are expected back soon. What the newcomer would drive out would have to be computed
    again, at each turn of too many conversations; so it is better served a little later. Turns that have a home pass it
    meanwhile. Where tools take long, waiting may cost more than it spares; the limit is what driving out would cost, in
    the same seconds.

    A conversation keeps its home. It gets another one, by one move at the beginning of a turn, if the home has no room
    for its turn and another worker has.
    """

    step_stretch = STEP_STRETCH

    def place(self, need: Need, cluster: Cluster) -> Placement | None:
        home = cluster.worker(need.conversation.home)
        if home is None:
            return self._first(need, cluster)
        return self._later(need, cluster, home)

    def _first(self, need: Need, cluster: Cluster) -> Placement | None:
        homes = self._likely(need, cluster, lambda worker: self._may_take(need, worker))
        options = [o for n, home in enumerate(homes) for o in self._options(need, cluster, home, n < FEW_HOMES)]
        if not options:
            return None
        best = min(options, key=lambda option: option.cost)
        # Of those that are as good: prefill at home, on a decoder, and where more pages are free.
        near = [o for o in options if o.cost <= best.cost + self._margin(best)]
        views = {home.name: home for home in homes}
        best = max(near, key=lambda o: (not o.prefill_at, views[o.home].role is Role.DECODER, views[o.home].free))
        return Placement(best, "cheapest for a first turn", options, share_history=True)

    def _later(self, need: Need, cluster: Cluster, home: WorkerView) -> Placement | None:
        fits = home.name in cluster.open and home.fits(need.pages)
        if fits and not (home.turns and home.room < need.pages):
            options = self._options(need, cluster, home)
            here = options[0]
            # This turn may wait a little for a prefiller to spare the streams at home, but not long: its client waits.
            fair = [o for o in options if o.first_token <= (1 + PATIENCE) * here.first_token + MARGIN_SECONDS]
            best = min(fair, key=lambda option: option.cost)
            if best.cost + self._margin(best) + AWAY_SECONDS < here.cost:
                return Placement(best, "an append beside others", options, share_history=True)
            return Placement(here, "at home", options)
        stay = Placement(Option(home.name), "nowhere better") if fits else None
        # Other turns of this conversation run there, or it has just moved: then it stays, unless it would have to wait.
        if need.conversation.active > 1 or (fits and need.conversation.moved_at == need.conversation.turns):
            return stay
        roomy = self._likely(need, cluster, lambda d: d is not home and need.pages <= self.elsewhere(d))
        if not roomy:
            return stay
        options = [option for d in roomy for option in self._options(need, cluster, d)]
        best = min(options, key=lambda option: option.cost)
        return Placement(best, "its home is full", options, share_history=True)

    def _may_take(self, need: Need, worker: WorkerView) -> bool:
        if not worker.fits(need.pages):
            return False
        # A turn that would drive out what is needed soon waits.
        crowded = worker.turns > 0 and worker.room - need.pages < ROOM * worker.total_pages
        return not crowded or need.waited > max(self._worth(need, worker), 0.0)

    def elsewhere(self, worker: WorkerView) -> float:
        free = not worker.turns or worker.turns < worker.max_turns
        return worker.room - ROOM * worker.total_pages if free else 0.0

    def patience(self, need: Need, cluster: Cluster) -> float:
        all_of_few = (*cluster.decoders, *cluster.prefillers)
        few = len(all_of_few) <= FEW_HOMES
        workers = all_of_few if few else islice(cluster.ranked(need.tokens, self._burden), FEW_HOMES)
        return min((self._worth(need, worker) for worker in workers), default=0.0)

    def _likely(self, need: Need, cluster: Cluster, may: Callable[[WorkerView], bool]) -> list[WorkerView]:
        """The open workers that `may` be the turn's home and are worth comparing: decoders first."""
        if len(cluster.workers) <= FEW_HOMES:
            return [w for w in (*cluster.decoders, *cluster.prefillers) if w.name in cluster.open and may(w)]
        ranked = list(cluster.ranked(need.tokens, self._burden))
        home = cluster.worker(need.conversation.home)
        host, best = home.host if home else "", need.known.best
        special = [w for w in ranked if (w.host == host if host else w.name in best)]
        found = {
            worker.name: worker
            for some, count in ((ranked, LIKELY_HOMES), (special, SPECIAL_HOMES))
            for worker in islice((w for w in some if w.name in cluster.open and may(w)), count)
        }
        return sorted(found.values(), key=lambda worker: worker.role is Role.PREFILLER)

    def _burden(self, tokens: int, worker: WorkerView) -> float:
        """What a turn of so many tokens, none of them known, costs here."""
        decode, beside = self._decode(tokens, TYPICAL_OUTPUT, worker)
        prefill, held_up = worker.speed.prefill(tokens), worker.speed.held_up(tokens)
        return worker.queue_seconds + prefill + decode + beside + self._streams(worker) * held_up

    def _worth(self, need: Need, worker: WorkerView) -> float:
        """How long a newcomer should wait for room here: `WORTH` times what computing as many tokens again costs."""
        again = worker.speed.prefill(need.tokens) + self._streams(worker) * worker.speed.held_up(need.tokens)
        return WORTH * again

    def _options(self, need: Need, cluster: Cluster, home: WorkerView, remote: bool = True) -> list[Option]:
        """The ways to serve a turn with this home, `remote` ones too; the first one is to prefill there."""
        decode, beside = self._decode(need.tokens, need.output, home)
        known, history_at, fetch = need.known[home.name], "", 0.0
        old = cluster.worker(need.conversation.home)
        if old is not None and old is not home and need.known[old.name] > known:
            history_at, fetch = old.name, cluster.copy_seconds(old, home, need.known[old.name] - known)
            known = need.known[old.name]
        new, streams = max(need.tokens - known, 1), self._streams(home)

        def at(worker: WorkerView, new: int, known: int, transfer: float, back: float = 0.0) -> Option:
            """A prefill of `new` tokens behind the `known` ones there, and the decode at home."""
            ways = ("", history_at) if worker is home else (worker.name, "")
            harm = beside + self._streams(worker) * worker.speed.held_up(new, known) + streams * back
            costs = worker.queue_seconds, worker.speed.prefill(new, known), transfer, decode, harm
            return Option(home.name, *ways, *costs)

        options = [at(home, new, known, fetch)]
        # Two that prefill for each other might wait for each other's pages.
        remote = remote and home.role is not Role.PREFILLER
        for p in cluster.prefillers_for(home, need.known) if remote else ():
            new, known, history, back = away(need, cluster, home, p)
            options.append(at(p, new, known, history + cluster.exposed_seconds(p, home), back))
        return options

    def _decode(self, tokens: int, output: int, home: WorkerView) -> tuple[float, float]:
        """How long the decode takes, with prompts in its steps as on average, and how much it slows others, in all."""
        step = home.speed.decode(home.turns + 1, home.tokens_in_use + tokens)
        step /= 1 - min(home.prefilling.value, MOST_PREFILLING)
        more = step - home.speed.decode(home.turns, home.tokens_in_use) if home.turns else 0.0
        return output * step, output * home.turns * max(more, 0.0)

    def _streams(self, worker: WorkerView) -> float:
        return max(worker.turns, worker.load.value)

    def _margin(self, option: Option) -> float:
        return MARGIN_SHARE * (option.first_token + option.harm) + MARGIN_SECONDS
