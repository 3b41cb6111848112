"""Places the turns that wait: asks the policy, and makes of its answer the message to the turn's home."""

from collections import Counter
from collections.abc import Set
from functools import partial

from miniserve.cluster.messages import Keep, Run
from miniserve.sampling_params import SamplingParams
from miniserve.scheduler.conversation import Conversation, Forecast
from miniserve.scheduler.ledger import Ledger
from miniserve.scheduler.placement import Need, Option, Placement, Policy
from miniserve.scheduler.prompts import Known
from miniserve.scheduler.queue import Group, WaitingQueue
from miniserve.scheduler.turns import TRIED_AFTER, Command, Note, Phases, Record, Send, Turn, TurnState
from miniserve.scheduler.workers import Cluster, WorkerView

READ = "free", "reserved", "turns", "queued_prefill_tokens"
"""What of a worker's view is in a decision as it is."""


class Placer:
    """The turns, the queue of those that wait, and what decisions about them read."""

    def __init__(self, policy: Policy, page_tokens: int) -> None:
        self.policy = policy
        self.cluster = Cluster(page_tokens)
        self.turns: dict[str, Turn] = {}
        """Those that wait or run, by their ids."""
        self.placements = Counter[tuple[str, str]]()
        """(prefilled at, home) -> turns."""
        self.notes = False
        """Whether to make records of decisions and outcomes; may change at any time."""
        self._forecast = Forecast()
        self._ledger = Ledger(self.cluster, self._forecast)
        self._queue = WaitingQueue(self._has_patience, self._fits, self._elsewhere, self.cluster.changed)
        self._commands: list[Command] = []  # what is to be done, until a method gives it out
        self._tried: Turn | None = None  # the suspected turn that was begun last
        self._closed: set[str] = set()  # workers that are kept for a suspected turn

    @property
    def placed(self) -> dict[str, int]:
        """Turns by where they were prefilled and live: `p0->d0`, or `d0` for both."""
        return {f"{a}->{b}" if a != b else a: n for (a, b), n in sorted(self.placements.items())}

    def _place_queued(self, now: float, everywhere: bool = False) -> list[Command]:
        """Place turns that wait on changed workers, or `everywhere`: time makes more possible. Gives out commands."""
        cluster, workers = self.cluster, self.cluster.workers.keys()
        if everywhere:
            cluster.changed.update(workers)
        if self._queue:
            self._ledger.give_up_late(now)
            closed = self._try_suspect(now) | cluster.retired
            cluster.changed |= self._closed - closed
            self._closed = closed
            self._queue.serve(partial(self._place, now), workers - closed if closed else workers, now)
        else:
            cluster.changed.clear()
        commands, self._commands = self._commands, []
        return commands

    def _place(self, now: float, turn: Turn, open_workers: Set[str]) -> bool:
        self.cluster.open = open_workers
        need = self._need(turn, now)
        if (placement := self.policy.place(need, self.cluster)) is not None:
            self._begin(turn, need, placement)
        return placement is not None

    def _try_suspect(self, now: float) -> set[str]:
        """Begin with the next suspected turn, unless one is being tried. Returns the workers that no other may take.

        One is tried at a time, on a decoder that has nothing left to stop, and where only turns run that were suspected
        before it and are not any more: so it is this one that the decoder dies of. If there is none, the one with the
        least others is closed until they have ended. All other workers serve as ever.
        """
        tried, decoders = self._tried, self.cluster.decoders
        if tried is not None and tried.suspected and tried.state in (TurnState.PREFILL, TurnState.DECODE):
            return {str(tried.home)}
        if not (suspects := self._queue.line(Group.SUSPECTS)) or not decoders:
            return set()
        turn = suspects[0][1]
        others = Counter(other.home for other in self.turns.values() if other.losses < TRIED_AFTER)
        home = min(decoders, key=lambda d: (others[d.name], len(d.leaving), not d.fits(turn.pages)))
        if others[home.name] or home.leaving or not home.fits(turn.pages):
            return {home.name}
        self._tried = turn
        self._queue.remove(turn, served=True)
        placement = Placement(Option(home.name), f"alone, since {turn.losses} workers died under it")
        before = turn.conversation.home
        self._begin(turn, self._need(turn, now), placement)
        self._queue.follow(turn.conversation, before or Group.ANYWHERE)
        return {home.name}

    def _has_patience(self, turn: Turn, now: float) -> bool:
        need = self._need(turn, now)
        return need.waited < self.policy.patience(need, self.cluster)

    def _fits(self, turn: Turn) -> bool:
        home = self.cluster.worker(turn.conversation.home)
        return home is not None and home.fits(turn.pages)

    def _elsewhere(self, worker: str) -> float:
        return self.policy.elsewhere(self.cluster.workers[worker])

    def _need(self, turn: Turn, now: float) -> Need:
        """What a policy reads of a turn. A run after the first one finds only what the conversation had before."""
        conversation = turn.conversation
        known = Known(self.cluster.prefixes.find(turn.chain), self.cluster.page_tokens)
        copied = min(conversation.copy_tokens, turn.known)
        for worker, tokens in ((conversation.copy_at, copied), (conversation.home, turn.known)):
            if worker:
                known[worker] = max(known[worker], self._reusable(turn, tokens))
        return Need(conversation, len(turn.tokens), turn.output, turn.pages, known, now, now - turn.arrived)

    def _reusable(self, turn: Turn, known: int) -> int:
        """How many of the `known` tokens a worker need not compute: with recurrent state, up to the last snapshot."""
        if not self.cluster.snapshot_pages:
            return known
        size = self.cluster.page_tokens
        return max([end // size * size for end in turn.conversation.ends if end // size * size <= known], default=0)

    def _begin(self, turn: Turn, need: Need, placement: Placement) -> None:
        """Begin a run of the turn: enter it into all books, and make the message to its home."""
        if self.notes:
            self._commands.append(Note(self._decision(turn, need, placement)))
        option, conversation, now = placement.option, turn.conversation, need.now
        home, prefills = (self.cluster.workers[name] for name in (option.home, option.prefill_at or option.home))
        turn.move(TurnState.PREFILL)
        turn.runs += 1
        turn.run = f"{turn.id}.{turn.runs}"
        turn.home, turn.prefill_at = home.name, option.prefill_at or None
        if turn.first_token is None:
            turn.placed, turn.phases = now, Phases()
        turn.chosen = option if placement.options else None
        if conversation.home not in (None, home.name):
            conversation.moves += 1
            conversation.moved_at = conversation.turns + 1
        conversation.home = home.name
        self._ledger.reserve(turn, now)
        # Its next report corrects this; but other turns may be placed before that comes.
        prefills.queued_prefill_tokens += need.new(prefills.name)
        self.cluster.touch(prefills.name)
        if not self.cluster.snapshot_pages:  # sub-agents come at once: the next one finds what this one computes
            self.cluster.prefixes.add(turn.chain, prefills.name)
        self.placements[prefills.name, home.name] += 1
        what = turn.run, turn.tokens, turn.params, turn.seed, conversation.salt, turn.delivered
        where = turn.prefill_at, placement.share_history, option.history_at or None
        keep = self._keep(conversation, len(turn.tokens), home, turn.number)
        self._commands.append(Send(home.name, Run(*what, *where, keep)))

    def _bring(self, name: str, conversation: Conversation, tokens: list[int], source: str, home: WorkerView) -> Send:
        """The message by which a home gets the KV of an idle conversation from another worker, as the run `name`."""
        keep, params = self._keep(conversation, len(tokens), home, conversation.turns), SamplingParams(max_tokens=1)
        run = Run(name, tokens, params, 0, conversation.salt, history_at=source, only_history=True, keep=keep)
        return Send(home.name, run)

    def _keep(self, conversation: Conversation, tokens: int, home: WorkerView, turns: int) -> Keep:
        """How soon the home will need these pages after so many turns, for when it runs out of pages between turns."""
        gap, chance = self._forecast.outlook(conversation.history, turns)
        page = self.cluster.page_tokens
        seconds = home.speed.prefill(page, max(tokens - page, 0))
        return Keep(str(conversation.key), gap, chance, seconds)

    def _decision(self, turn: Turn, need: Need, placement: Placement) -> Record:
        """The record of a turn that was placed."""
        workers = {
            w.name: {name: getattr(w, name) for name in READ}
            | {"load": w.load.value, "prefilling": w.prefilling.value, "known": need.known[w.name]}
            for w in (*self.cluster.prefillers, *self.cluster.decoders)
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
            "policy": self.policy.name,
            "tokens": need.tokens,
            "expected_output": need.output,
            "pages": need.pages,
            "queued": need.now - turn.arrived,
            "workers": workers,
            "options": placement.options,
            **{name: getattr(placement.option, name) for name in ("home", "prefill_at", "history_at")},
            "reason": placement.reason,
        }
