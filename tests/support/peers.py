"""Workers as their names say: p0 is a prefiller, d0 a decoder."""

from __future__ import annotations

from miniserve.cluster.messages import Peer, PoolInfo
from miniserve.config import Role


def peer(name: str, epoch: int = 1, *, pages: int = 100, page_bytes: int = 4096) -> Peer:
    """A worker whose pool holds nothing."""
    role = Role.PREFILLER if name.startswith("p") else Role.DECODER
    return Peer(name, epoch, name, PoolInfo(1, 1, pages, page_bytes, ""), role)
