"""Places the turns that wait: asks the policy, and makes of its answer the message to the turn's home."""

from collections.abc import Mapping, Set

from miniserve.cluster.messages import Keep, Run
from miniserve.config import Role
from miniserve.scheduler.commands import Command, Note, Send
from miniserve.scheduler.forecast import Forecast
from miniserve.scheduler.ledger import Ledger
from miniserve.scheduler.placement import Need, Placement, Policy
from miniserve.scheduler.queue import WaitingQueue
from miniserve.scheduler.records import decision
from miniserve.scheduler.turns import Phases, Turn, TurnState
from miniserve.scheduler.workers import Cluster, Link, PrefixIndex, WorkerView


class Placer:
    """The queue of waiting turns, and what decisions about them read. `policy_name` is for the records of decisions.
    `workers` and `links` are the scheduler's own, and change."""

    def __init__(
        self,
        policy: Policy,
        policy_name: str,
        page_tokens: int,
        workers: Mapping[str, WorkerView],
        links: dict[tuple[str, str], Link],
        ledger: Ledger,
        forecast: Forecast,
    ) -> None:
        self.policy = policy
        self.queue = WaitingQueue(self._has_patience)
        self.prefixes = PrefixIndex()
        self.placements: dict[tuple[str, str], int] = {}
        """(prefilled at, home) -> turns."""
        self._policy_name = policy_name
        self._page_tokens = page_tokens
        self._workers = workers
        self._links = links
        self._ledger = ledger
        self._forecast = forecast

    def place_queued(self, now: float, *, notes: bool) -> list[Command]:
        """Place the waiting turns that can be placed. With `notes`, each decision is noted."""
        if not self.queue:
            return []
        self._ledger.give_up_late(now)
        commands: list[Command] = []
        prefillers, decoders = self._by_role()

        def place(turn: Turn, open_workers: Set[str]) -> bool:
            placed = self._place(turn, Cluster(prefillers, decoders, open_workers, self._links), now, notes)
            commands.extend(placed)
            return bool(placed)

        # While a decoder lives, an idle prefiller is not counted as a home: most policies never choose one.
        homes = [*decoders, *(p for p in prefillers if p.turns or p.resident or not decoders)]
        self.queue.serve(place, self._workers.keys(), {w.name for w in homes}, now)
        return commands

    def _place(self, turn: Turn, cluster: Cluster, now: float, notes: bool) -> list[Command]:
        """Place a turn; no commands if it has to wait."""
        need = self._need(turn, now)
        placement = self.policy.place(need, cluster)
        if placement is None:
            return []
        commands: list[Command] = []
        if notes:
            commands.append(Note(decision(self._policy_name, turn, need, placement, cluster)))
        return [*commands, Send(placement.home, self._begin(turn, need, placement, now))]

    def _has_patience(self, turn: Turn, now: float) -> bool:
        need = self._need(turn, now)
        cluster = Cluster(*self._by_role(), self._workers.keys(), self._links)
        return need.waited < self.policy.patience(need, cluster)

    def _by_role(self) -> tuple[list[WorkerView], list[WorkerView]]:
        prefillers: list[WorkerView] = []
        decoders: list[WorkerView] = []
        for worker in self._workers.values():
            (prefillers if worker.role is Role.PREFILLER else decoders).append(worker)
        return prefillers, decoders

    def _need(self, turn: Turn, now: float) -> Need:
        """What a policy reads of a turn. A run after the first one finds only what the conversation had before."""
        conversation = turn.conversation
        known = {name: pages * self._page_tokens for name, pages in self.prefixes.find(turn.chain).items()}
        if conversation.copy_at:
            copied = min(conversation.copy_tokens, turn.known)
            known[conversation.copy_at] = max(known.get(conversation.copy_at, 0), copied)
        if conversation.home:
            known[conversation.home] = max(known.get(conversation.home, 0), turn.known)
        return Need(conversation, len(turn.tokens), turn.output, turn.pages, known, now, now - turn.arrived)

    def _begin(self, turn: Turn, need: Need, placement: Placement, now: float) -> Run:
        """Begin a run of the turn: enter it into all books, and make the message to its home."""
        conversation, home = turn.conversation, self._workers[placement.home]
        prefills = self._workers[placement.prefill_at] if placement.prefill_at else home
        turn.move(TurnState.PREFILL)
        turn.runs += 1
        turn.run = f"{turn.id}.{turn.runs}"
        turn.home, turn.prefill_at = home.name, placement.prefill_at or None
        if turn.first_token is None:
            turn.placed, turn.phases = now, Phases()
        turn.chosen = next(
            (o for o in placement.options if (o.home, o.prefill_at) == (home.name, placement.prefill_at)), None
        )
        if conversation.home not in (None, home.name):
            conversation.moves += 1
            conversation.moved_at = conversation.turns + 1
        conversation.home = home.name
        self._ledger.reserve(turn, now)
        # Its next report corrects this; but other turns may be placed before that comes.
        prefills.queued_prefill_tokens += need.new(prefills.name)
        key = (prefills.name, home.name)
        self.placements[key] = self.placements.get(key, 0) + 1
        return Run(
            turn.run,
            turn.tokens,
            turn.params,
            turn.seed,
            turn.salt,
            turn.delivered,
            placement.prefill_at,
            placement.share_history,
            placement.history_at,
            self._keep(turn, home),
        )

    def _keep(self, turn: Turn, home: WorkerView) -> Keep:
        """How soon the home will need this conversation's pages again, for when it runs out of pages between turns."""
        gap, chance = self._forecast.outlook(turn.conversation.history, turn.number)
        last_page = max(len(turn.tokens) - self._page_tokens, 0)
        seconds = home.speed.prefill(self._page_tokens, last_page)
        return Keep(str(turn.conversation.key), gap, chance, seconds)
