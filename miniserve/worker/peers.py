"""The other workers that live, and the ways to their pages."""

from collections.abc import Callable

from miniserve.cluster.messages import Peer
from miniserve.kv.transfer.interface import Transfer


class PeerTable:
    """The living peers of one worker by their names. `connect` finds the way to a peer's pages, None if there is
    none."""

    def __init__(self, connect: Callable[[Peer], Transfer | None]) -> None:
        self._connect = connect
        self._peers: dict[str, tuple[Peer, Transfer | None]] = {}
        self._announced: dict[str, int] = {}

    def __getitem__(self, name: str) -> Peer:
        return self._peers[name][0]

    def get(self, name: str) -> Peer | None:
        """The peer, None if it is dead or was never announced."""
        return self._peers[name][0] if name in self._peers else None

    def transfer(self, name: str) -> Transfer | None:
        return self._peers[name][1] if name in self._peers else None

    def lives(self, peer: Peer) -> bool:
        """Whether this very incarnation of a peer lives."""
        found = self.get(peer.name)
        return found is not None and found.epoch == peer.epoch

    def is_early(self, name: str, epoch: int) -> bool:
        """Whether a message is from an incarnation of a peer that has not been announced yet."""
        return name not in self._announced or self._announced[name] < epoch

    def replace(self, peers: list[Peer]) -> None:
        """The workers that live now. Ways to the others are closed."""
        known, self._peers = self._peers, {}
        for peer in peers:
            self._announced[peer.name] = peer.epoch
            old = known.get(peer.name)
            self._peers[peer.name] = known.pop(peer.name) if old and old[0] == peer else (peer, self._connect(peer))
        for _, transfer in known.values():
            if transfer is not None:
                transfer.close()
