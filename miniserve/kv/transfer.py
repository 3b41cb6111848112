"""How KV pages get from one worker's pool into another's. One interface; `connect` chooses what serves a pair.

Both sides of a pair hold a `Transfer`. Whoever has pages offers them and puts the ticket into its publication; whoever
reads the publication fetches with that ticket. Nothing here blocks the engine.
"""

from __future__ import annotations

import logging
import subprocess
from typing import TYPE_CHECKING, Literal, Protocol

from miniserve.cluster.messages import Peer, PoolInfo

if TYPE_CHECKING:
    from miniserve.kv.memory import KVMemory

log = logging.getLogger("miniserve.transfer")

BACKENDS = ("auto", "mapped", "collective")
Way = Literal["mapped", "nccl", "gloo"]
"""The last two are `collective`."""


class TransferError(RuntimeError):
    """The pages did not come: the peer is gone, or stuck."""


class Copy(Protocol):
    """Pages on their way here."""

    @property
    def seconds(self) -> float:
        """How long they were on their way beside our steps, once `stored`; what `store` itself takes comes on top."""
        ...

    @property
    def ready(self) -> bool:
        """Whether `store` would return at once."""
        ...

    def store(self, ours: list[int]) -> None:
        """Begin to write them to our pages `ours`, as many and in the order of `fetch`. Raises `TransferError`."""
        ...

    @property
    def stored(self) -> bool:
        """Whether what `store` has begun is done, so that anybody may read the pages. On a CPU, when it returns. Raises
        `TransferError` if it will never be; nothing is written to the pages then."""
        ...

    def abandon(self) -> None:
        """Nobody wants any more what `store` has begun. From now on the pages may be given to others: whatever is still
        written to them is written before all that the engine computes, or another copy writes, from here on."""
        ...


class Transfer(Protocol):
    """The way between one peer's pool and our own, both directions."""

    name: str

    def offer(self, pages: list[int]) -> tuple[int, int]:
        """Our side: `pages` of our pool, complete on the device, are about to be published. The ticket goes along with
        the publication."""
        ...

    def fetch(self, ticket: tuple[int, int], pages: list[int]) -> Copy:
        """Begin to get `pages` of the peer's pool. Once for each publication with pages, in their order, even if nobody
        wants them any more."""
        ...

    def close(self) -> None:
        """The peer is gone."""
        ...


def connect(memory: KVMemory, layout: str, us: tuple[str, int], peer: Peer, run_dir: str, how: str) -> Transfer | None:
    """The way between our pool and `peer`'s; None if there is none (another layout, no access, or it is gone).

    `us` is our name and epoch. `how` is one of `BACKENDS`; the sockets of `collective` are found through `run_dir`.
    """
    kind = way(memory.info(layout), peer.pool, how)
    # Each when it is needed: torch.distributed takes a while to import, and the simulator needs no torch at all.
    if kind == "gloo":
        from miniserve.kv.collective import CollectiveTransfer

        return CollectiveTransfer(memory, us, peer, run_dir)
    if kind is None:
        return None
    try:
        if kind == "nccl":
            from miniserve.kv.nccl import Nccl
            from miniserve.kv.remote import RemoteTransfer

            return RemoteTransfer(Nccl(memory), memory, us, peer, run_dir)
        if memory.shared is not None:
            from miniserve.kv.mapped import MappedTransfer

            return MappedTransfer(memory, peer)
        from miniserve.kv.ipc import CudaMappedTransfer

        return CudaMappedTransfer(memory, peer)
    # The number of a dead process may be another one's by now; a kernel may not be compiled for want of a compiler.
    except (OSError, ValueError, RuntimeError, ImportError, subprocess.SubprocessError) as error:
        log.warning("no way to the pool of %s: %s", peer.name, error)
        return None


def way(one: PoolInfo, other: PoolInfo, how: str) -> Way | None:
    """How pages travel between two pools if `how` (one of `BACKENDS`) is asked for; None if they cannot.

    The same whichever comes first: both workers of a pair choose by it, and the frontend tells what they chose. NCCL
    has no way between two ranks on one GPU.
    """
    if one.layout != other.layout:
        return None
    gpus = None if one.cuda is None or other.cuda is None else (one.cuda, other.cuda)
    reach = gpus is not None and gpus[0].device in gpus[1].reach and gpus[1].device in gpus[0].reach
    if how != "collective" and (reach or (one.fd >= 0 and other.fd >= 0)):
        return "mapped"
    if how == "mapped" or (how == "auto" and gpus is None):
        return None
    return "nccl" if gpus is not None and gpus[0].device != gpus[1].device else "gloo"
