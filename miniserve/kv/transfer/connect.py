"""Which way KV pages take between two workers' pools: `way` decides by what both pools are, `connect` opens it."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Literal

from miniserve.cluster.messages import Peer, PoolInfo
from miniserve.kv.transfer.interface import Transfer

if TYPE_CHECKING:
    from miniserve.kv.memory import KVMemory
    from miniserve.kv.transfer.door import Door

log = logging.getLogger("miniserve.transfer")


def connect(memory: KVMemory, ours: PoolInfo, door: Door, peer: Peer, how: str) -> Transfer | None:
    """The way between `memory`, which is what `ours` says, and the pool of `peer`; None if there is none (another
    layout, no access, or it is gone).

    `how` is `EngineConfig.kv_transfer`; `door` is where the ways called `collective` meet.
    """
    kind = way(ours, peer.pool, how)
    # Each backend is imported when it is needed: the frontend, which asks for the `way`, needs no torch.
    if kind is None:
        return None
    try:
        if kind == "sockets":
            from miniserve.kv.transfer.sockets import SocketTransfer

            return SocketTransfer(memory, door, peer)
        if kind == "nccl":
            from miniserve.kv.transfer.nccl import Nccl
            from miniserve.kv.transfer.remote import RemoteTransfer

            return RemoteTransfer(Nccl(memory), door, peer)
        from miniserve.kv.transfer.mapped import MappedTransfer

        return MappedTransfer(memory, peer)
    # Another process may have the number of a dead one by now.
    except (OSError, ValueError, RuntimeError) as error:
        log.warning("no way to the pool of %s: %s", peer.name, error)
        return None


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
