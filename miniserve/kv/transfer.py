"""How KV pages get from one worker's pool into another's. One interface; `connect` chooses what serves a pair.

Both sides of a pair hold a `Transfer`. Whoever has pages offers them and puts the ticket into its publication; whoever
reads the publication fetches with that ticket. Nothing here blocks the engine.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from miniserve.cluster.messages import Peer

if TYPE_CHECKING:
    from miniserve.kv.memory import KVMemory

BACKENDS = ("auto", "mapped", "collective")


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
        """Begin to write them to our pages `ours`, as many and in the order of `fetch`. Once. Raises `TransferError`."""
        ...

    @property
    def stored(self) -> bool:
        """Whether what `store` has begun is done: from then on anybody may read the pages. On a CPU, when it returns."""
        ...

    def abandon(self) -> None:
        """Nobody wants any more what `store` has begun. From now on the pages may be given to others: whatever is still
        written to them is written before all that the engine computes, or another copy writes, from here on."""
        ...


class Transfer(Protocol):
    """The way between one peer's pool and our own, both directions."""

    name: str

    def offer(self, pages: list[int]) -> tuple[int, int]:
        """Our side: `pages` of our pool are about to be published. The ticket goes along with the publication."""
        ...

    def fetch(self, ticket: tuple[int, int], pages: list[int]) -> Copy:
        """Begin to get `pages` of the peer's pool. Once for each publication with pages, in their order, even if nobody
        wants them any more."""
        ...

    def close(self) -> None:
        """The peer is gone."""
        ...


def connect(memory: KVMemory, layout: str, us: tuple[str, int], peer: Peer, run_dir: str, how: str) -> Transfer | None:
    """The way between our pool and `peer`'s; None if there is none (another layout, device memory, or it is gone).

    `us` is our name and epoch. `how` is one of `BACKENDS`; the sockets of `collective` are found through `run_dir`.
    """
    if peer.pool.layout != layout or memory.shared is None:
        return None
    # Each when it is needed: torch.distributed takes a while to import, and the simulator needs no torch at all.
    if how == "collective":
        from miniserve.kv.collective import CollectiveTransfer

        return CollectiveTransfer(memory, us, peer, run_dir)
    if peer.pool.fd < 0:
        return None
    from miniserve.kv.mapped import MappedTransfer

    try:
        return MappedTransfer(memory, peer)
    except (OSError, ValueError):  # the number of a dead process may be another one's by now
        return None
