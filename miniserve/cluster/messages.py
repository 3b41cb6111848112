"""Everything that crosses a process boundary: typed structs in msgpack, no pickle.

Every process owns one inbox, to which the others send `Envelope`s. The sender's epoch (the number of this incarnation
of a worker) travels with each message, so that messages of a dead process are recognised and dropped.
"""

from typing import Literal

import msgspec

from miniserve.cluster.rank_messages import RankCommand, Stored, Wire
from miniserve.config import Role
from miniserve.sampling_params import SamplingParams

FinishReason = Literal["stop", "length", "abort"]


class CudaHandle(Wire, frozen=True):
    """A KV pool on a GPU, as CUDA IPC lets another process of the same host map it: what torch's `_share_cuda_` gives.

    The pool is `size` bytes at `offset` of what `handle` names; `counter` and `counter_offset` are torch's own count of
    those who map it. The pool is on GPU number `device`, which can read the memory of the GPUs in `reach`, itself among
    them: numbers among those that the workers see, all of them the same.
    """

    device: int
    reach: list[int]
    handle: bytes
    size: int
    offset: int
    counter: bytes
    counter_offset: int
    refused: str = ""
    """Why no process can map it, not even one on the same GPU; then `reach` is empty."""


class PoolInfo(Wire, frozen=True):
    """Where a worker's KV pool lies, so that a peer on the same `host` can map it; one elsewhere asks for pages at the
    `door`, an address and a port. All on the frontend's host have the same name of a host, "" with local workers.

    On a CPU it is anonymous shared memory: a peer opens it as /proc/`pid`/fd/`fd`; `fd` is -1 where it is not. On a GPU
    it is what `cuda` names. Its first `num_pages` pages are those that the worker gives out. `layout` fingerprints
    model, dtype and page shape; workers with different layouts never exchange pages. A snapshot of recurrent state, if
    the model has one, takes `snapshot_pages`.
    """

    pid: int
    fd: int
    num_pages: int
    page_bytes: int
    layout: str
    cuda: CudaHandle | None = None
    snapshot_pages: int = 0
    host: str = ""
    door: str = ""
    others: "list[PoolInfo]" = []
    """Those of the worker's further ranks, in their order; the pool above is that of rank 0."""


class Peer(Wire, frozen=True):
    """A worker as the others see it: its inbox `address`, the one `far` for other hosts, its pool and role."""

    name: str
    epoch: int
    address: str
    pool: PoolInfo
    role: Role = Role.DECODER
    far: str = ""


class TokenLogprob(Wire, frozen=True, gc=False):
    """The log-probability of a token and of the most likely alternatives, before any penalty or temperature."""

    token: int
    logprob: float
    rank: int
    top: list[tuple[int, float]]


class FirstToken(Wire, frozen=True):
    """A run of a turn has computed its prompt and sampled. Output `index` (0 is the turn's first output token) and what
    follows it are `tokens`: none where the turn ends with them, then `Ended` has them.

    The KV of `cached_tokens` of the prompt was found; `prefill` are the seconds from when the turn got its pages.
    `prompt_logprobs`, if wanted, are those of all tokens of the prompt but the first.
    """

    turn: str
    index: int
    tokens: list[int]
    cached_tokens: int
    prefill: float
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[TokenLogprob] | None = None


class Tokens(Wire, frozen=True):
    """The next output tokens of a turn, from output `index` on."""

    turn: str
    index: int
    tokens: list[int]
    logprobs: list[TokenLogprob] | None = None


class Ended(Wire, frozen=True):
    """The last output tokens of a turn, from `index` on, and why it ends: `stop_token` is the last, if that did it."""

    turn: str
    index: int
    tokens: list[int]
    finish: FinishReason
    stop_token: int | None = None
    logprobs: list[TokenLogprob] | None = None


class Failed(Wire, frozen=True):
    """A turn cannot go on after `index` outputs, for the reason `error`. `invalid`: the request itself is at fault."""

    turn: str
    index: int
    error: str
    invalid: bool = False


TurnOutput = FirstToken | Tokens | Ended | Failed
"""What a worker reports of a turn; `turn` is what `Run` called it."""


class Peers(Wire, frozen=True):
    """The workers that are ready, sent to all of them when these change. A peer missing here is dead, or not up yet."""

    peers: list[Peer]


class Keep(Wire, frozen=True):
    """What was observed of a turn's conversation, so that its worker knows whose KV to give up first between turns.
    `conversation` names the pages that belong together. The next turn is expected `gap` seconds after the end of this
    one, with probability `chance`; recomputing one of its pages would take `page_seconds`."""

    conversation: str = ""
    gap: float = 0.0
    chance: float = 1.0
    page_seconds: float = 0.0


class Run(Wire, frozen=True):
    """Serve one turn: prefill `tokens`, decode until it ends, report every token.

    `turn` names this run: a turn that starts anew elsewhere gets a new name, and what still travels of the old is void.

    The last `prior` of `tokens` were already given to the client as output (a turn that moved here after a failure).
    `seed` is always set: two workers that sample the same position draw the same number. With `prefill_at` (a
    prefiller's name) the receiver reserves pages, asks that worker to prefill and pulls the KV; with `share_history`
    that worker may first fetch from the receiver what it lacks of the conversation's history. With `history_at` (the
    worker that was the conversation's home) the receiver fetches the history from there before anything else; with
    `only_history` that is all, and an `Ended` says that it is over.
    """

    turn: str
    tokens: list[int]
    params: SamplingParams
    seed: int
    salt: str = ""
    prior: int = 0
    prefill_at: str | None = None
    share_history: bool = False
    history_at: str | None = None
    keep: Keep = Keep()
    only_history: bool = False


class Abort(Wire, frozen=True):
    """Stop a turn wherever it is and free what it holds; unknown turns are ignored."""

    turn: str


class Shutdown(Wire, frozen=True):
    """Leave the step loop and exit."""


class Prefill(Run, frozen=True):
    """D asks P to prefill what it was asked to run. D has reserved its pages and already holds the first `have` tokens
    (a whole number of pages), so P publishes only what follows. With `share_history` P may fetch those it lacks."""

    have: int = 0


class Fetch(Wire, frozen=True):
    """Asks for the KV of a conversation's history: the pages whose chain hashes are `hashes`, from page `first` of the
    prompt on. The answer is publications of as many of them as are there, the final one being `last`."""

    turn: str
    first: int
    hashes: list[bytes]


class Publish(Wire, frozen=True):
    """Finished pages, which hold the prompt from page `first` on. Without any pages it only says: still at work.

    `pages` are numbers in the sender's pool and `hashes` the chain hash of the tokens each one holds. They stay
    untouched until the `Release`, but not past `deadline`: what is copied later does not count. The sender had finished
    them at `finished_at`. Both are seconds on the monotonic clock of the sender's host. `last` ends the handoff. A
    prefill ends with `commit`, the first token as P reports it to the frontend: D decodes on from it, and reports it
    too, since P may die before its own report is read. `state` are pages with the recurrent state after the last of
    `pages`, of a model that has one; their names follow from the last hash.
    """

    turn: str
    first: int
    pages: list[int]
    hashes: list[bytes]
    finished_at: float
    deadline: float
    last: bool = False
    commit: FirstToken | None = None
    history: bool = False
    """Whether this answers a `Fetch`, not a `Prefill`."""
    state: list[int] = []


class Release(Wire, frozen=True):
    """The receiver is done with a handoff (acknowledged, aborted, given up): the sender ends the lease and its work."""

    turn: str


class PrefillRefused(Wire, frozen=True):
    """P cannot or will not finish this prefill: D does it itself."""

    turn: str
    reason: str


PeerMessage = Prefill | Fetch | Publish | Release | PrefillRefused


class RankReady(Wire, frozen=True):
    """A rank carries out commands from now on, and has this pool."""

    rank: int
    pool: PoolInfo


class Loading(Wire, frozen=True):
    """Progress while a worker starts; `done` of `total` (0 where unknown) steps of `phase`."""

    phase: str
    done: int = 0
    total: int = 0


class Facts(Wire, frozen=True):
    """What a person wants to know of an engine. `kernels` names those that it runs, and why it lacks others, `phases`
    are seconds per start-up phase, `kv_note` the arithmetic of the pool's size."""

    dtype: str
    device: str
    kernels: str
    threads: int
    weights_bytes: int
    page_tokens: int
    max_model_len: int
    vocab_size: int
    phases: dict[str, float]
    kv_note: str


class Ready(Facts, frozen=True, kw_only=True):
    """A worker is up. Its inbox is also bound at `far`, for other hosts."""

    pool: PoolInfo
    far: str = ""


class StartFailed(Wire, frozen=True):
    """A worker could not start: the reason, and what to do about it, for a person. `trace` says where in the code, if
    it is an error that the code does not expect."""

    reason: str
    trace: str = ""


class Move(Wire, frozen=True):
    """A handoff that ended well: KV of `turn` went from `source` to the reporting worker, which copied for `seconds` in
    all, and for `exposed` seconds after the source had finished its work: what no overlap has hidden. `history` is true
    where the source was asked for what it had, not for a prefill."""

    turn: str
    source: str
    pages: int
    bytes: int
    seconds: float
    exposed: float = 0.0
    history: bool = False


class StepTime(Wire, frozen=True):
    """What one step computed in how many `seconds`: `prefill` tokens of prompts, which looked back on `prefill_context`
    tokens in all, and `decodes` tokens, drafted ones among them, of sequences with `decode_context` tokens in all."""

    prefill: int
    prefill_context: int
    decodes: int
    decode_context: int
    seconds: float


class Counters(msgspec.Struct, array_like=True, kw_only=True):
    """What an engine has done since it started; only grows. `held_tokens` are those that were sampled as drafted."""

    steps: int = 0
    preemptions: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    drafted_tokens: int = 0
    held_tokens: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0


class WorkerStats(Counters):
    """A snapshot of one worker. free + cached + held = total pages.

    `host_pages` of `host_total` pages of host memory hold evicted KV; `offloaded` and `restored` count pages copied
    there and back, `saved` and `loaded` those written to disk and read. Of snapshots of recurrent state there are
    `snapshots` in the pool; `snapshots_saved` and `snapshots_used` count."""

    total_pages: int
    free_pages: int
    cached_pages: int
    held_pages: int
    running: int
    waiting: int
    queued_prefill_tokens: int
    leases: int
    busy_seconds: float = 0.0
    host_total: int = 0
    host_pages: int = 0
    offloaded: int = 0
    restored: int = 0
    saved: int = 0
    loaded: int = 0
    snapshots: int = 0
    snapshots_saved: int = 0
    snapshots_used: int = 0


class Report(Wire, frozen=True):
    """After a step, or once a second when idle: tokens, finished handoffs, the worker's state, the steps since the last
    report, and the turns that were stopped since."""

    outputs: list[TurnOutput]
    moves: list[Move]
    stats: WorkerStats
    steps: list[StepTime] = []
    stopped: list[str] = []


FromWorker = Stored | RankReady | Loading | Ready | StartFailed | Report
Message = Peers | Run | Abort | Shutdown | PeerMessage | RankCommand | FromWorker


class Envelope(msgspec.Struct, array_like=True, frozen=True):
    """A message and who sent it. The frontend's epoch is 0."""

    sender: str
    epoch: int
    body: Message
