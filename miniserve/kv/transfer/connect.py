"""Which way KV pages take between two workers' pools: `way` decides by what both pools are, `connect` opens it."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Literal

from miniserve.cluster.messages import Peer, PoolInfo
from miniserve.kv.transfer.interface import Transfer

if TYPE_CHECKING:
    from miniserve.kv.memory import KVMemory

log = logging.getLogger("miniserve.transfer")


def connect(memory: KVMemory, layout: str, us: tuple[str, int], peer: Peer, run_dir: str, how: str) -> Transfer | None:
    """The way between our pool and `peer`'s; None if there is none (another layout, no access, or it is gone).

    `us` is our name and epoch. `how` is `EngineConfig.kv_transfer`; `run_dir` has the sockets of `collective`.
    """
    kind = way(memory.info(layout), peer.pool, how)
    # Each backend is imported when it is needed: the frontend, which asks for the `way`, needs no torch.
    if kind is None:
        return None
    try:
        if kind == "sockets":
            from miniserve.kv.transfer.sockets import SocketTransfer

            return SocketTransfer(memory, us, peer, run_dir)
        if kind == "nccl":
            from miniserve.kv.transfer.nccl import Nccl
            from miniserve.kv.transfer.remote import RemoteTransfer

            return RemoteTransfer(Nccl(memory), memory, us, peer, run_dir)
        from miniserve.kv.transfer.mapped import CudaMappedTransfer, MappedTransfer

        return CudaMappedTransfer(memory, peer) if memory.shared is None else MappedTransfer(memory, peer)
    # Another process may have the number of a dead one by now.
    except (OSError, ValueError, RuntimeError) as error:
        log.warning("no way to the pool of %s: %s", peer.name, error)
        return None


def way(one: PoolInfo, other: PoolInfo, how: str) -> Literal["mapped", "nccl", "sockets"] | None:
    """How pages travel between two pools if `how` (`EngineConfig.kv_transfer`) is asked for; None if they cannot.
    NCCL and sockets are the ways that are called `collective`.

    The order of the two makes no difference: both workers of a pair choose by it, and the frontend shows what they
    chose. NCCL has no way between two ranks on one GPU.
    """
    if one.layout != other.layout:
        return None
    gpus = None if one.cuda is None or other.cuda is None else (one.cuda, other.cuda)
    reach = gpus is not None and gpus[0].device in gpus[1].reach and gpus[1].device in gpus[0].reach
    if how != "collective" and (reach or (one.fd >= 0 and other.fd >= 0)):
        return "mapped"
    if how == "mapped" or (how == "auto" and gpus is None):
        return None
    return "nccl" if gpus is not None and gpus[0].device != gpus[1].device else "sockets"
