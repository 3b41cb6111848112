"""The receiver's side of handoffs: it asks for KV, checks and copies what is published, and goes on from there."""

import logging
import math
from collections import deque
from collections.abc import Callable, Set
from dataclasses import dataclass, field

from miniserve.cluster.messages import Ended, Fetch, Message, Move, Peer, PrefillRefused, Publish, Release, TurnOutput
from miniserve.kv.transfer.door import TransferError
from miniserve.kv.transfer.interface import Copy, Transfer
from miniserve.worker.engine import Engine
from miniserve.worker.peers import PeerTable
from miniserve.worker.sequence import Sequence, State

log = logging.getLogger("miniserve.handoff")


@dataclass
class Pull:
    """A handoff from `source`, until `deadline`: pages of the first `reached` tokens are here, or `arriving`."""

    sequence: Sequence
    source: Peer
    transfer: Transfer
    history: bool
    deadline: float
    reached: int
    pages: int = 0
    seconds: float = 0.0
    arriving: deque[tuple[Publish, Copy | None]] = field(default_factory=deque)

    def __post_init__(self) -> None:
        self.near = self.source.address != self.source.far
        self.ahead = 0.0 if self.near else math.inf
        """By how much our clock seems ahead of a source's on another host: what its fastest message took."""


@dataclass(eq=False)
class Receiver:
    """The handoffs in which this worker gets KV. The arguments are those of `Handoffs`."""

    engine: Engine
    peers: PeerTable
    page_bytes: int
    patience: float
    send: Callable[[str, Message], None]
    clock: Callable[[], float]
    moves: list[Move] = field(default_factory=list)
    """Handoffs that ended well since the last report; who reports them empties both lists."""
    outputs: list[TurnOutput] = field(default_factory=list)
    """First tokens that came with a commit since the last report."""
    pulls: dict[str, Pull] = field(default_factory=dict)
    """Those under way, by turn."""

    @property
    def copying(self) -> bool:
        """Whether pages are on their way here: `poll` should be called soon."""
        return any(pull.arriving for pull in self.pulls.values())

    def give_up_the_dead(self, lost: Set[str] = frozenset()) -> None:
        """Go on without peers that live no more, or whose inboxes, at these addresses, are `lost` to us."""
        for turn, pull in list(self.pulls.items()):
            if not self.peers.lives(pull.source.name, pull.source.epoch) or pull.source.address in lost:
                self._give_up(turn, f"{pull.source.name} is gone")

    def request(self, sequence: Sequence) -> None:
        """`sequence` has just got all its pages: ask for what others are to fill them with, the history first."""
        turn, size = sequence.turn, self.engine.page_tokens
        # The page of the last token is always computed.
        most = sequence.findable // size if sequence.history_pages is None else sequence.history_pages
        wanted = sequence.hashes(size)[sequence.computed // size : most]
        if sequence.history_at and wanted and (pull := self._begin(sequence, sequence.history_at, history=True)):
            self.send(pull.source.address, Fetch(turn, sequence.computed // size, wanted))
            return
        if sequence.prefill_at and (pull := self._begin(sequence, sequence.prefill_at, history=False)):
            if sequence.state is State.FETCHING:
                sequence.move(State.RECEIVING)
            self.send(pull.source.address, sequence.asked())
            return
        if sequence.only_history:
            self.engine.finish(sequence)
            self.outputs.append(Ended(turn, 0, [], "stop"))
            return
        self.engine.resume(sequence)

    def _begin(self, sequence: Sequence, source: str, *, history: bool) -> Pull | None:
        """Prepare for pages of `source`; None if there is no way to them."""
        peer, transfer = self.peers.living.get(source), self.peers.ways.get(source)
        if peer is None or transfer is None:
            log.warning("turn %s: no way to pages of %s, computing them here", sequence.turn, source)
            return None
        pull = Pull(sequence, peer, transfer, history, self.clock() + self.patience, sequence.computed)
        self.pulls[sequence.turn] = pull
        return pull

    def on_publish(self, message: Publish, sender: str) -> None:
        """Begin to copy what the sender has finished; with the last publication the sequence is ours."""
        pull = self.pulls.get(message.turn)
        if pull is None or pull.source.name != sender or pull.history != message.history:
            return
        if not pull.near:
            pull.ahead = min(pull.ahead, self.clock() - message.finished_at)
        pull.deadline = self.clock() + self.patience
        if reason := self._misfit(pull, message):
            self._give_up(message.turn, reason)
            return
        copy = None
        if pages := message.pages + message.state:
            started, sequence, end = self.clock(), pull.sequence, message.first + len(message.pages)
            ours = sequence.pages[message.first : end] + sequence.arriving[: len(message.state)]
            copy = pull.transfer.fetch(pages, ours, message.deadline)
            pull.seconds += self.clock() - started
            pull.reached = min(end * self.engine.page_tokens, sequence.given)
        pull.arriving.append((message, copy))
        self._advance(pull)

    def poll(self) -> None:
        """Take in what has arrived, and give up what will not come any more. Call it between steps."""
        now = self.clock()
        for turn, pull in list(self.pulls.items()):
            self._advance(pull)
            if self.pulls.get(turn) is pull and now > pull.deadline:
                self._give_up(turn, f"nothing has come for {self.patience:g} s")

    def _advance(self, pull: Pull) -> None:
        """Take in what has arrived, in its order, as far as that goes without waiting."""
        while pull.arriving and self.pulls.get(pull.sequence.turn) is pull:
            message, copy = pull.arriving[0]
            failure = ""
            try:
                if copy is not None and not copy.stored:
                    return
            except TransferError as error:
                failure = str(error)
            pull.arriving.popleft()
            self._take(pull, message, copy, failure)

    def _misfit(self, pull: Pull, message: Publish) -> str:
        """Why the pages of a publication are not what the sequence needs next; empty if they are."""
        sequence, size, end = pull.sequence, self.engine.page_tokens, message.first + len(message.pages)
        if not message.pages and not message.last:
            return ""  # a sign of life
        if message.first * size != pull.reached or end > len(sequence.pages):
            return f"pages {message.first} to {end} do not follow {pull.reached} tokens"
        if message.state and len(message.state) != len(sequence.arriving):
            return f"a state of {len(message.state)} pages came where one of {len(sequence.arriving)} was expected"
        if message.hashes != sequence.given_hashes(size)[message.first : end]:
            return "the pages hold other tokens than ours"
        return ""

    def _take(self, pull: Pull, message: Publish, copy: Copy | None, failure: str) -> None:
        """The pages of one publication are stored, or there was a failure."""
        sequence, size = pull.sequence, self.engine.page_tokens
        end, snapshots = message.first + len(message.pages), self.engine.snapshots
        if copy is not None:
            pull.seconds += copy.seconds
            if pull.near and self.clock() > message.deadline:  # elsewhere, who sends them says that
                failure = "the lease ended before the pages were copied"  # the sender may have reused one by then
            if not failure:
                pull.pages += len(message.pages) + len(message.state)
            # Without the state after them, pages are of no use, and will be computed once more.
            if not failure and (snapshots is None or message.state):
                sequence.computed = min(end * size, sequence.given)
                if snapshots is not None:
                    snapshots.arrive(sequence, sequence.computed, self.clock())
                self.engine.register(sequence)
        if message.commit is not None and end * size >= self.engine.handed(sequence):
            # The client may have this token already: we go on from it even if we have to compute the pages.
            self.outputs += self.engine.commit(sequence, message.commit)
        if failure:
            self._give_up(message.turn, failure)
        elif message.last:
            self._complete(pull, self.clock() - message.finished_at - pull.ahead)

    def _complete(self, pull: Pull, exposed: float) -> None:
        sequence = pull.sequence
        if not pull.history and sequence.computed != (handed := self.engine.handed(sequence)):
            self._give_up(sequence.turn, f"the commit came at {sequence.computed} of {handed} tokens")
            return
        del self.pulls[sequence.turn]
        self.send(pull.source.address, Release(sequence.turn))
        if pull.pages or not pull.history:
            what = sequence.turn, pull.source.name, pull.pages, pull.pages * self.page_bytes
            self.moves.append(Move(*what, seconds=pull.seconds, exposed=max(exposed, 0.0), history=pull.history))
        self._go_on(pull)

    def _go_on(self, pull: Pull) -> None:
        sequence = pull.sequence
        if pull.history:
            sequence.cached = max(sequence.cached or 0, sequence.computed)
            sequence.history_at = None
            self.request(sequence)
        elif sequence.finish:
            self.engine.finish(sequence)
        else:
            self.engine.resume(sequence)

    def on_refused(self, message: PrefillRefused) -> None:
        if message.turn in self.pulls:
            self._give_up(message.turn, message.reason)

    def abort(self, turn: str) -> None:
        """The client has left: the sender need not go on."""
        if turn in self.pulls:
            self.send(self._drop(turn).source.address, Release(turn))

    def _drop(self, turn: str) -> Pull:
        """Nothing more is stored for this pull: its pages may be computed here, or be another's, at once."""
        pull = self.pulls.pop(turn)
        for _, copy in pull.arriving:
            if copy is not None:
                copy.abandon()
        return pull

    def _give_up(self, turn: str, reason: str) -> None:
        """Go on alone from the last token that was verified."""
        pull = self._drop(turn)
        log.warning("turn %s: handoff from %s failed (%s), computing here", turn, pull.source.name, reason)
        if self.peers.lives(pull.source.name, pull.source.epoch):
            self.send(pull.source.address, Release(turn))
        self._go_on(pull)
