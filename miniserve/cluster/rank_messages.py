"""What rank 0 of a worker tells its other ranks, which carry it out in this order; and the base of all messages."""

from typing import Literal

import msgspec


class Wire(msgspec.Struct, tag=True, array_like=True, frozen=True):
    """Base of all messages: tagged, immutable, encoded as arrays."""


class Forward(Wire, frozen=True):
    """Compute a batch, as `ops.Batch` describes it; of the first `scored` outputs the logits are made block by block.
    With `fed` some tokens are still on rank 0's device, and come from there."""

    tokens: list[int]
    positions: list[int]
    outputs: list[int]
    lengths: list[int]
    contexts: list[int]
    pages: list[list[int]]
    slots: list[int]
    scored: int = 0
    fed: bool = False


class Copied(Wire, frozen=True):
    """Copy between pages and slots: of recurrent state (`save`, `load`; `clear`: no target), else of host memory."""

    what: Literal["clear", "save", "load", "offload", "restore"]
    sources: list[int]
    targets: list[int]


class Store(Wire, frozen=True):
    """Copy pages `theirs` of the same rank of `peer` to `ours`; the answer is `Stored` with this `number`."""

    number: int
    peer: str
    theirs: list[int]
    ours: list[int]
    lease: float


class Abandon(Wire, frozen=True):
    """Give up a `Store`."""

    number: int


class Settle(Wire, frozen=True):
    """Wait until the devices of all ranks have come this far."""


class Stored(Wire, frozen=True):
    """A rank has stored what rank 0 told it to; or it cannot, because of `error`."""

    number: int
    error: str


RankCommand = Forward | Copied | Store | Abandon | Settle
