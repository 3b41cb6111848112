"""What every way between two pools does: `Transfer`, and the `Copy` of one publication. `way` says which one two pools
take by what both are, and `connect` opens it.

Both sides of a pair hold a `Transfer`. The receiver of a publication fetches its pages; the sender does nothing for
them, its lease keeps them as they are. No call of a `Transfer` blocks the engine.
"""

import logging
import math
from typing import TYPE_CHECKING, Literal, Protocol

from miniserve.cluster.messages import Peer, PoolInfo
from miniserve.kv.transfer.door import Door

if TYPE_CHECKING:
    from miniserve.kv.memory import KVMemory  # needs torch, which the frontend does not

log = logging.getLogger("miniserve.transfer")


class Copy(Protocol):
    """Pages on their way to ours."""

    @property
    def seconds(self) -> float:
        """How long they were on their way beside our steps, once `stored`; what `fetch` itself takes comes on top."""

    @property
    def stored(self) -> bool:
        """Whether all are written, so that every reader may read the pages. Raises `TransferError` if they will never
        be; nothing is written to the pages then."""

    def abandon(self) -> None:
        """Give them up. From now on the pages may be given to other sequences: whatever is still written to them is
        written before all that the engine computes, or another copy writes, from here on."""


class Transfer(Protocol):
    """The way between one peer's pool and our own, both directions."""

    def fetch(self, theirs: list[int], ours: list[int], lease: float = math.inf) -> Copy:
        """Begin to write pages `theirs` of the peer's pool, which are complete on its device, to our pages `ours`, as
        many and in this order. If the peer sends them, they do not count when its clock shows more than `lease` at the
        end. Who copies them itself, on the peer's host, reads the same clock."""

    def close(self) -> None:
        """The peer is gone."""


def way(one: PoolInfo, other: PoolInfo, how: str) -> Literal["mapped", "nccl", "sockets"] | None:
    """How pages travel between two pools if `how` (`EngineConfig.kv_transfer`) is asked for; None if they cannot.
    NCCL and sockets are the ways that are called `collective`.

    The order of the two makes no difference: both workers of a pair choose by it, and the frontend shows what they
    chose. Memory is mapped on one host only. NCCL has no way between two ranks on one GPU.
    """
    if one.layout != other.layout:
        return None
    gpus, near = None if one.cuda is None or other.cuda is None else (one.cuda, other.cuda), one.host == other.host
    reach = gpus is not None and gpus[0].device in gpus[1].reach and gpus[1].device in gpus[0].reach
    if how != "collective" and near and (reach or (one.fd >= 0 and other.fd >= 0)):
        return "mapped"
    if how == "mapped" or (how == "auto" and gpus is None and near):
        return None
    return "nccl" if gpus is not None and not (near and gpus[0].device == gpus[1].device) else "sockets"


def connect(memory: "KVMemory", ours: PoolInfo, door: Door, peer: Peer, how: str) -> Transfer | None:
    """The `way` between `memory`, which is what `ours` says, and the pool of `peer`; None if there is none (another
    layout, no access, or it is gone). `door` is where the ways called `collective` meet."""
    # Each backend is imported when it is needed: the frontend, which asks for the `way`, needs no torch.
    try:
        match way(ours, peer.pool, how):
            case "mapped":
                from miniserve.kv.transfer.mapped import MappedTransfer

                return MappedTransfer(memory, peer)
            case "sockets":
                from miniserve.kv.transfer.pair import Line, PairTransfer

                return PairTransfer(Line(memory), Line(memory), door, peer)
            case "nccl":
                from miniserve.kv.transfer.nccl import Nccl, nccl_transfer

                return nccl_transfer(Nccl(memory), door, peer)
    # Another process may have the number of a dead one by now.
    except (OSError, ValueError, RuntimeError) as error:
        log.warning("no way to the pool of %s: %s", peer.name, error)
    return None
