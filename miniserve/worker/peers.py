"""The other workers that live, and the ways to their pages."""

from collections.abc import Callable

from miniserve.cluster.messages import Peer
from miniserve.kv.transfer.interface import Transfer


class PeerTable:
    """The `living` peers of one worker and the `ways` to their pages; `connect` finds a way, None if there is none."""

    def __init__(self, connect: Callable[[Peer], Transfer | None]) -> None:
        self.living: dict[str, Peer] = {}
        self.ways: dict[str, Transfer | None] = {}
        self._connect = connect
        self._announced: dict[str, int] = {}

    def lives(self, name: str, epoch: int) -> bool:
        """Whether this very incarnation of a peer lives."""
        return name in self.living and self.living[name].epoch == epoch

    def is_early(self, name: str, epoch: int) -> bool:
        """Whether a message is from an incarnation of a peer that has not been announced yet."""
        return name not in self._announced or self._announced[name] < epoch

    def replace(self, peers: list[Peer]) -> None:
        """The workers that live now. Ways to the others are closed."""
        before, known = self.living, self.ways
        self.living = {peer.name: peer for peer in peers}
        same = {name for name, peer in self.living.items() if before.get(name) == peer}
        self.ways = {n: known.pop(n) if n in same else self._connect(peer) for n, peer in self.living.items()}
        self._announced |= {peer.name: peer.epoch for peer in peers}
        for transfer in filter(None, known.values()):
            transfer.close()
