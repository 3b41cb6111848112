"""One turn on a worker: its tokens, its pages, how far it has come, and the states it may be in."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import KW_ONLY, dataclass, field
from enum import Enum, StrEnum
from typing import TYPE_CHECKING, NamedTuple

from miniserve.cluster.messages import FinishReason, Keep, Prefill, Run, TokenLogprob
from miniserve.config import tables
from miniserve.kv.disk import Load
from miniserve.kv.hashing import page_hashes, root_hash
from miniserve.kv.pages import PagePool
from miniserve.sampling_params import SamplingParams
from miniserve.states import follow, transitions
from miniserve.worker.drafts import Drafter

if TYPE_CHECKING:
    # They need torch or llguidance, which the simulator does not.
    from miniserve.kv.side import Fence
    from miniserve.worker.grammar import Matcher


class State(StrEnum):
    """Where a sequence stands on its worker."""

    COMPILING = "compiling"
    """Its grammar is being compiled."""
    WAITING = "waiting"
    """It waits for pages: it is new, or was preempted."""
    FETCHING = "fetching"
    """It has its pages, and the KV of earlier turns comes from the worker that holds it."""
    RECEIVING = "receiving"
    """It has its pages, and a prefiller computes the prompt and hands its KV over."""
    RUNNING = "running"
    """This worker computes it: the prompt in chunks, then a token in each step."""
    PUBLISHED = "published"
    """It was prefilled for another worker, which may still copy the pages."""
    FINISHED = "finished"
    """It is over, and its pages are given back."""


TRANSITIONS = transitions(State, tables("states.toml")["sequence"])


class Admission(Enum):
    """What came of trying to give a waiting sequence its pages."""

    ADMITTED = "admitted"
    COMPILING = "its grammar is being compiled"
    LOADING = "its first pages come from disk"
    REFUSED = "its grammar cannot be followed"
    SHARED = "a running prefill computes the next page of its prefix"
    NO_PAGES = "there are not enough pages"


class Deferral(NamedTuple):
    """A sequence has to wait: `page` of its prefix was not found. With NO_PAGES it is matched again when that one is
    known, when a page was freed after the first `freed`, and at `until`: found pages count as needed for a second."""

    admission: Admission
    page: int
    freed: int
    until: float


@dataclass(eq=False)
class Snapshot:
    """The recurrent state after the first `tokens`, in `pages`, which are complete when `saved` is passed. One that
    `rolls` is that of the last page end, written anew at each; it is `named` when no step can change it any more."""

    tokens: int
    pages: list[int]
    saved: Fence | None = None
    rolls: bool = False
    named: bool = False


@dataclass(eq=False, repr=False)
class Sequence:
    """`tokens` grows from the prompt by what is sampled; the KV of the first `computed` of them lies in `pages`.

    `given` tokens came with the request, the last `prior` of which the client has already seen as output. The sequence
    fetches the KV of earlier turns from the worker `history_at`, which holds `history_pages` of its pages (None: not
    known), and has the rest prefilled by the worker `prefill_at`, which may fetch from this one what it lacks of the
    history (`share_history`). With `prefill_for` this worker prefills for that one, and is done with the first
    sampled token.
    """

    turn: str
    tokens: list[int]
    params: SamplingParams
    seed: int
    root: bytes
    """The hash before the first token: those of the pages follow from it."""
    _: KW_ONLY
    salt: str = ""
    prior: int = 0
    prefill_at: str | None = None
    prefill_for: str | None = None
    history_at: str | None = None
    history_pages: int | None = None
    only_history: bool = False
    """Nothing is computed: it ends when its history is here."""
    share_history: bool = False
    keep: Keep = Keep()  # noqa: RUF009 - immutable
    state: State = State.WAITING
    load: Load | None = None
    """What was asked of the disk for it, if anything."""
    deferral: Deferral | None = None
    """Why it did not get its pages when it was last tried, while it waits."""
    pages: list[int] = field(default_factory=list)
    computed: int = 0
    under_way: int = 0
    """Tokens after the computed ones whose KV a launched step computes."""
    sampling: bool = False
    """Whether a launched step samples the token that comes after `tokens`."""
    drafter: Drafter | None = None
    """Guesses how the sequence goes on; None where nothing is to be guessed."""
    scores: list[TokenLogprob] = field(default_factory=list)
    """Log-probabilities of the prompt's tokens from the second on, as far as they are wanted and computed."""
    registered: int = 0
    """Full pages that the prefix cache knows."""
    cached: int | None = None
    """Tokens whose KV was found when the turn was first admitted; None before that."""
    admitted: float = 0.0
    """When it first got its pages (seconds of the engine's clock)."""
    slot: int | None = None
    """Where its recurrent state is, if the model has one, from its admission until nothing more is computed of it."""
    stops: list[int] = field(default_factory=list)
    """After how many tokens a step has to end, so that the state can be saved there."""
    snapshots: list[Snapshot] = field(default_factory=list)
    arriving: list[int] = field(default_factory=list)
    """Pages for the state that comes from another worker, or is to be handed over."""
    owns_snapshot: bool = False
    """Whether the snapshot that was found for it is of its own conversation."""
    compiling: Future[Matcher] | None = None
    """The grammar's compilation, in the state COMPILING."""
    matcher: Matcher | None = None
    """What the outputs must match; None where they are free."""
    finish: FinishReason | None = None
    stop_token: int | None = None

    def __post_init__(self) -> None:
        self.tokens = list(self.tokens)
        self.given = len(self.tokens)
        self._hashes: list[bytes] = []

    @classmethod
    def of(cls, run: Run, layout: str) -> Sequence:
        """The sequence of a run; `layout` is the root of all page hashes."""
        same = {name: getattr(run, name) for name in Run.__struct_fields__}
        return cls(root=root_hash(layout, run.salt), **same)

    def asked(self) -> Prefill:
        """What a prefiller is asked to do of it, beside the tokens that are here already."""
        what = self.turn, self.tokens, self.params, self.seed, self.salt, self.prior
        return Prefill(*what, share_history=self.share_history, keep=self.keep, have=self.computed)

    def move(self, state: State) -> None:
        """Go to another state. Raises `IllegalTransition`."""
        self.state = follow(TRANSITIONS, self.state, state)

    @property
    def num_outputs(self) -> int:
        """Output tokens of the turn so far, wherever they were made."""
        return len(self.tokens) - self.given + self.prior

    @property
    def outputs(self) -> list[int]:
        return self.tokens[len(self.tokens) - self.num_outputs :]

    @property
    def missing(self) -> int:
        """Tokens whose KV is not there."""
        return len(self.tokens) - self.computed

    @property
    def length(self) -> int:
        """Tokens there are, the one that is being sampled included."""
        return len(self.tokens) + self.sampling

    @property
    def to_launch(self) -> int:
        """Tokens whose KV is neither there nor under way: 1 means that the next step is a decode."""
        return self.length - self.computed - self.under_way

    @property
    def next_piece(self) -> int:
        """Tokens that a step may compute: all that are to be launched, but none past the next stop."""
        at = self.computed + self.under_way
        return min([self.to_launch, *(stop - at for stop in self.stops if stop > at)])

    @property
    def scoring(self) -> bool:
        """Whether the prompt's log-probabilities are wanted: the client has them with the first output."""
        return self.params.prompt_logprobs is not None and not self.num_outputs

    @property
    def findable(self) -> int:
        """Tokens at the beginning whose KV need not be computed if it is found, here or elsewhere. The last one is
        always computed, since its logits give the next one, and so is what has to be scored."""
        return min(len(self.tokens) - 1, len(self.scores)) if self.scoring else len(self.tokens) - 1

    @property
    def needed_soon(self) -> Keep:
        """What the page pool should know while the sequence waits: it needs its pages as soon as there is room."""
        return Keep(self.keep.conversation, gap=1.0, chance=1.0, page_seconds=self.keep.page_seconds)

    def can_go_on(self, max_len: int) -> bool:
        """Whether a step can be launched for it now. While a token is being sampled that is so if it is not the last
        one for sure, and if neither what a grammar lets come next nor a draft depends on which it is."""
        if not self.sampling:
            return True
        params = self.params
        last = self.prefill_for is not None or self.length >= max_len
        last = last or (params.max_tokens is not None and self.num_outputs + 1 >= params.max_tokens)
        return not last and params.grammar is None and self.drafter is None

    def hashes(self, page_tokens: int) -> list[bytes]:
        """Chain hashes of all full pages of `tokens`."""
        if len(self._hashes) < len(self.tokens) // page_tokens:
            self._hashes = page_hashes(self.root, self.tokens, page_tokens, self._hashes)
        return self._hashes

    def register(self, pool: PagePool, page_tokens: int) -> None:
        """Make the full pages whose KV is complete known to the prefix cache."""
        full = self.computed // page_tokens
        if full > self.registered:
            hashes = self.hashes(page_tokens)
            for page in range(self.registered, full):
                pool.register(self.pages[page], hashes[page], hashes[page - 1] if page else None)
            self.registered = full

    def given_hashes(self, page_tokens: int) -> list[bytes]:
        """Chain hashes of all pages of the given tokens, that of a last page which is not full included."""
        full = self.given // page_tokens
        hashes = self.hashes(page_tokens)[:full]
        if tail := self.tokens[full * page_tokens : self.given]:
            hashes += page_hashes(hashes[-1] if hashes else self.root, tail, len(tail))
        return hashes

    def extend(self, tokens: list[int], eos: frozenset[int], max_len: int) -> None:
        """Add the next outputs up to the one that the turn ends with, and then set `finish`."""
        params = self.params
        most = max_len if params.max_tokens is None else min(max_len, self.given - self.prior + params.max_tokens)
        for token in tokens[: most - len(self.tokens)]:
            self.tokens.append(token)
            # Where a grammar lets a turn end, nothing could follow.
            if token in params.stop_token_ids or (token in eos and not (params.ignore_eos and params.grammar is None)):
                self.stop_token = token
                self.finish = "stop"
                return
        if len(self.tokens) >= most:
            self.finish = "length"
