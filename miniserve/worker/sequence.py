"""One turn on a worker: its tokens, its pages, and how far it has come."""

from __future__ import annotations

from concurrent.futures import Future
from enum import Enum
from typing import TYPE_CHECKING

from miniserve.cluster.messages import FinishReason, Keep
from miniserve.kv.hashing import extend_hash, page_hashes
from miniserve.sampling_params import SamplingParams
from miniserve.worker.drafts import Drafter

if TYPE_CHECKING:
    from miniserve.worker.grammar import Matcher  # needs numpy and llguidance, which the simulator does not


class Status(Enum):
    """Where a sequence stands. A preempted one waits again."""

    WAITING = "waiting"
    RECEIVING = "receiving"
    """Its pages are reserved and another worker fills them: not ours to compute yet."""
    RUNNING = "running"
    FINISHED = "finished"


class Sequence:
    """`tokens` grows from the prompt by what is sampled; the KV of the first `computed` of them lies in `pages`.

    `given` tokens came with the request, the last `prior` of which the client has already seen as output.
    With `history_at` another worker is asked for the KV of earlier turns; with `prefill_at` one is asked to prefill the
    rest, and with `share_history` that one may ask for ours. With `prefill_for` this worker prefills for another one,
    and is done with the first sampled token.
    """

    def __init__(
        self,
        turn: str,
        tokens: list[int],
        params: SamplingParams,
        seed: int,
        root: bytes,
        *,
        prior: int = 0,
        prefill_at: str = "",
        prefill_for: str = "",
        history_at: str = "",
        share_history: bool = False,
        keep: Keep = Keep(),  # noqa: B008 - immutable
    ) -> None:
        self.turn = turn
        self.tokens = list(tokens)
        self.given = len(tokens)
        self.prior = prior
        self.params = params
        self.seed = seed
        self.prefill_at = prefill_at
        self.prefill_for = prefill_for
        self.history_at = history_at
        self.share_history = share_history
        self.keep = keep
        self.status = Status.WAITING
        self.pages: list[int] = []
        self.computed = 0
        self.under_way = 0
        """Tokens after these whose KV a launched step is computing."""
        self.sampling = False
        """Whether a launched step samples the token that comes after `tokens`."""
        self.drafter: Drafter | None = None
        """Who guesses how it goes on; None where nothing is to be guessed."""
        self.draft: list[int] = []
        """Tokens after these that a launched step computes too, in case it samples them."""
        self.registered = 0
        """Full pages that the prefix cache knows."""
        self.cached: int | None = None
        """Tokens whose KV was found when the turn was first admitted."""
        self.admitted = 0.0
        """When it first got its pages (seconds of the engine's clock)."""
        self.compiling: Future[Matcher] | None = None
        """What its outputs must match, perhaps not ready yet; None where they are free."""
        self.finish: FinishReason | None = None
        self.stop_token: int | None = None
        self._root = root
        self._hashes: list[bytes] = []

    @property
    def num_outputs(self) -> int:
        """Output tokens of the turn so far, wherever they were made."""
        return len(self.tokens) - self.given + self.prior

    @property
    def outputs(self) -> list[int]:
        """These tokens."""
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

    def can_go_on(self, max_len: int) -> bool:
        """Whether a step can be launched for it now. While a token is being sampled that is so if it is not the last
        one for sure, and if neither the choice of the next one nor a draft depends on which it is."""
        if not self.sampling:
            return True
        params = self.params
        last = self.prefill_for or self.length >= max_len
        last = last or (params.max_tokens is not None and self.num_outputs + 1 >= params.max_tokens)
        return not last and not params.looks_back and self.drafter is None

    def hashes(self, page_tokens: int) -> list[bytes]:
        """Chain hashes of all full pages of `tokens`."""
        if len(self._hashes) < len(self.tokens) // page_tokens:
            self._hashes = page_hashes(self._root, self.tokens, page_tokens, self._hashes)
        return self._hashes

    def given_hashes(self, page_tokens: int) -> list[bytes]:
        """Chain hashes of all pages of the given tokens, that of a last page which is not full included."""
        full = self.given // page_tokens
        hashes = self.hashes(page_tokens)[:full]
        if tail := self.tokens[full * page_tokens : self.given]:
            hashes.append(extend_hash(hashes[-1] if hashes else self._root, tail))
        return hashes

    def append(self, token: int, eos: frozenset[int], max_len: int) -> None:
        """Add `token` as the next output and set `finish` if the turn ends with it."""
        self.tokens.append(token)
        params = self.params
        # Where a grammar lets a turn end, nothing could follow.
        if token in params.stop_token_ids or (token in eos and not (params.ignore_eos and params.grammar is None)):
            self.stop_token = token
            self.finish = "stop"
        limit = params.max_tokens is not None and self.num_outputs >= params.max_tokens
        if self.finish is None and (limit or len(self.tokens) >= max_len):
            self.finish = "length"
