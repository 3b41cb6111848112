"""The further ranks of a worker: processes on the same host, each with its device, that do what rank 0 does.

Rank 0 is the worker to everyone else. It starts the others, and tells them in order each batch that it computes and
each copy that it makes; they do the same with their parts of the model and of all pages. A worker with a dead rank is
dead.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

import msgspec
import zmq

from miniserve.cluster import messages, rank_messages
from miniserve.cluster.channels import Inbox, Outboxes
from miniserve.cluster.launch import WorkerProcess, WorkerSpec
from miniserve.kv.transfer.door import Door, TransferError
from miniserve.kv.transfer.interface import Copy, Transfer, connect
from miniserve.worker.peers import PeerTable

if TYPE_CHECKING:
    from miniserve.worker.build import Built

IDLE_SECONDS, SOON_SECONDS = 1.0, 0.001
"""How long a process waits for messages, at most: an idle worker then looks at its leases and reports; and while pages
or a compiled grammar are about to come."""
EXPLAINED = 1
"""The exit code of a rank that has told the frontend why it ends."""


class Ranks:
    """The others, as rank 0 has them; none where the worker is one process, and in other ranks. `spec` is our own."""

    def __init__(self, spec: WorkerSpec, outboxes: Outboxes) -> None:
        self.pools: list[messages.PoolInfo] = []
        """Those of the others in their order, after `meet`."""
        self.storing: WeakValueDictionary[int, EveryCopy] = WeakValueDictionary()
        """Copies that rank 0 has had all ranks store, by their numbers."""
        self.numbers = count(1)
        self._outboxes, self._closing = outboxes, False
        others = range(1, 1 if spec.rank else spec.engine.tensor_parallel_size)
        if others:
            memory = os.memfd_create("miniserve-ranks", os.MFD_CLOEXEC)
            spec = msgspec.structs.replace(spec, region=f"/proc/{os.getpid()}/fd/{memory}", leader=spec.address)
        self.spec = spec
        self._addresses = [f"ipc://{spec.run_dir}/{spec.name}.{spec.epoch}.{rank}" for rank in others]
        specs = [msgspec.structs.replace(spec, rank=r, address=self._addresses[r - 1]) for r in others]
        self._processes = [WorkerProcess(other) for other in specs]
        for process in self._processes:
            threading.Thread(target=self._watch, args=(process,), daemon=True).start()

    def _watch(self, process: WorkerProcess) -> None:
        """End the worker with one of the others, for which it may wait in a step."""
        rank, code = process.spec.rank, process.wait()
        if self._closing:
            return
        if code != EXPLAINED:
            context = zmq.Context()  # those of the worker's belong to another thread
            last_words = Outboxes(context, self.spec.name, self.spec.epoch, self.spec.keys)
            reason = f"Rank {rank} of the worker {self.spec.name} ended with exit code {code}."
            last_words.send(self.spec.frontend, messages.StartFailed(reason))
            last_words.close(linger_ms=1000)
            context.term()
        os._exit(EXPLAINED)

    def meet(self, inbox: Inbox) -> None:
        """Wait until all others carry out commands."""
        pools: dict[int, messages.PoolInfo] = {}
        while len(pools) < len(self._processes):
            for envelope in inbox.receive(1000):
                if isinstance(envelope.body, messages.RankReady):
                    pools[envelope.body.rank] = envelope.body.pool
        self.pools = [pools[rank] for rank in sorted(pools)]

    def tell(self, command: rank_messages.RankCommand | messages.Peers) -> None:
        """Have the others do something, after all commands before."""
        for address in self._addresses:
            self._outboxes.send(address, command)

    def heard(self, stored: rank_messages.Stored) -> None:
        if copy := self.storing.get(stored.number):
            copy.missing -= 1
            copy.error = copy.error or stored.error

    def close(self) -> None:
        """End them."""
        self._closing = True
        for process in self._processes:
            process.stop(2.0)


@dataclass(eq=False)
class EveryTransfer:
    """The `Transfer` of all ranks, each to the same rank of the `peer`; `own` is that of rank 0."""

    ranks: Ranks
    own: Transfer
    peer: str

    def fetch(self, theirs: list[int], ours: list[int], lease: float = math.inf) -> EveryCopy:
        number = next(self.ranks.numbers)
        self.ranks.tell(rank_messages.Store(number, self.peer, theirs, ours, lease))
        copy = EveryCopy(self.ranks, number, self.own.fetch(theirs, ours, lease), len(self.ranks.pools))
        self.ranks.storing[number] = copy
        return copy

    def close(self) -> None:
        """The others close theirs when they hear that the peer is gone."""
        self.own.close()


@dataclass(eq=False)
class EveryCopy:
    """A `Copy` by all ranks. `missing` of the others have not stored it yet."""

    ranks: Ranks
    number: int
    own: Copy
    missing: int
    error: str = ""

    @property
    def seconds(self) -> float:
        return self.own.seconds

    @property
    def stored(self) -> bool:
        try:
            if self.error:
                raise TransferError(self.error)
            return self.own.stored and not self.missing
        except TransferError:
            self.abandon()  # another rank may still be at it
            raise

    def abandon(self) -> None:
        self.ranks.tell(rank_messages.Abandon(self.number))
        self.own.abandon()


@dataclass(eq=False)
class Follower:
    """Another rank than 0: it carries out rank 0's commands. `reply` takes what rank 0 is to hear."""

    rank: int
    built: Built
    peers: PeerTable
    reply: Callable[[rank_messages.Stored | messages.RankReady], None]
    storing: dict[int, Copy] = field(default_factory=dict)
    """Copies that are not done."""

    def do(self, command: object) -> None:
        """Carry out one command."""
        host, snapshots = self.built.engine.host, self.built.engine.snapshots
        match command:
            case rank_messages.Forward():
                self.built.runner.follow(command)
            case rank_messages.Copied("offload" | "restore" as what, sources, targets) if host is not None:
                host.slots.copy(what, sources, targets)
            case rank_messages.Copied("clear", [slot]) if snapshots is not None:
                snapshots.slots.clear(slot)
            case rank_messages.Copied("save", [slot], pages) if snapshots is not None:
                snapshots.slots.save(slot, pages)
            case rank_messages.Copied("load", pages, [slot]) if snapshots is not None:
                snapshots.slots.load(slot, pages)
            case rank_messages.Settle():
                self.built.runner.settle()
            case messages.Peers(peers):
                self.peers.replace(peers)
            case rank_messages.Store(number, peer, theirs, ours, lease):
                if (transfer := self.peers.ways.get(peer)) is not None:
                    self.storing[number] = transfer.fetch(theirs, ours, lease)
                else:
                    self.reply(rank_messages.Stored(number, f"rank {self.rank} has no way to its pages"))
            case rank_messages.Abandon(number):
                if copy := self.storing.pop(number, None):
                    copy.abandon()
            case other:
                raise TypeError(f"ranks do not take a {type(other).__name__}")

    def poll(self) -> None:
        """Say which copies are done."""
        for number, copy in list(self.storing.items()):
            error = ""
            try:
                if not copy.stored:
                    continue
            except TransferError as failure:
                error = str(failure)
            del self.storing[number]
            self.reply(rank_messages.Stored(number, error))


def open_pool(spec: WorkerSpec, built: Built) -> tuple[Door, messages.PoolInfo]:
    """Where peers ask for the pages of a rank, and what they have to know of its pool. Raises `ConfigError`."""
    pool, engine = built.memory.info(built.layout), spec.engine
    if pool.cuda and pool.cuda.refused and engine.workers > 1 and engine.kv_transfer != "collective":
        engine.fall_back(f"a KV pool that no other process can map by CUDA IPC: {pool.cuda.refused}")
    us = f"{spec.name}-{spec.rank}" if spec.rank else spec.name, spec.epoch
    door = Door(us, spec.run_dir, spec.keys.secret.encode(), spec.host, spec.listen)
    return door, msgspec.structs.replace(pool, host=spec.host, door=door.far)


def follow(spec: WorkerSpec, built: Built, inbox: Inbox, outboxes: Outboxes) -> None:
    """Do what rank 0 says, until it ends this process."""
    door, pool = open_pool(spec, built)

    def way(peer: messages.Peer) -> Transfer | None:
        """To the same rank of the peer, which has as many if its layout is ours."""
        if peer.pool.layout != built.layout:
            return None
        name, theirs = f"{peer.name}-{spec.rank}", peer.pool.others[spec.rank - 1]
        same = msgspec.structs.replace(peer, name=name, pool=theirs)
        return connect(built.memory, pool, door, same, spec.engine.kv_transfer)

    follower = Follower(spec.rank, built, PeerTable(way), lambda body: outboxes.send(spec.leader, body))
    follower.reply(messages.RankReady(spec.rank, pool))
    while True:
        for envelope in inbox.receive(int((SOON_SECONDS if follower.storing else IDLE_SECONDS) * 1000)):
            follower.do(envelope.body)
        follower.poll()
