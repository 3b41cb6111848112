"""Pages that go to host memory and back, between two workers, and into snapshots: who reads and writes them, on which
streams, and what orders these. The rules of order can be broken one by one, to see that this is noticed."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import count
from typing import Any
from unittest.mock import patch

import msgspec
import torch

from miniserve.cluster.messages import Message, Peer, Prefill, Publish
from miniserve.kv import side, states, swap
from miniserve.kv.hashing import root_hash
from miniserve.kv.transfer import mapped
from miniserve.kv.transfer.mapped import MappedCopy, MappedTransfer
from miniserve.ops.decoder import Batch
from miniserve.worker.handoff import Handoffs
from miniserve.worker.runner import ModelRunner
from miniserve.worker.sequence import Sequence
from scripts.gpu.common import add, busy, greedy
from tests.gpu_stand_in.programs.common import engine, fresh
from tests.support.fake_cuda.device import logged, note
from tests.support.fake_cuda.order import Page, accesses, begins, drops, ends, unordered

SHAPE = {"hidden_size": 512, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 128, "vocab_size": 32000}
RECURRENT = {"hidden_size": 512, "head_dim": 128, "num_experts": 4, "num_experts_per_tok": 2, "vocab_size": 32000}
RECURRENT |= {"linear_num_key_heads": 2, "linear_num_value_heads": 4}
SETTINGS: dict[str, Any] = {"max_model_len": 512, "max_num_batched_tokens": 128, "kv_cache_memory": 2**20}
numbers = count(1)
pools: dict[int, str] = {}
"""The names of pools, by where they lie."""


latest = 0
"""The number of the access that was marked last."""


@contextmanager
def access(name: str, reads: list[Page], writes: list[Page]) -> Iterator[None]:
    """Marks what the current stream is given meanwhile."""
    global latest
    latest, stream = next(numbers), torch.cuda.current_stream().cuda_stream
    note(stream, begins(latest, name, reads, writes))
    yield
    note(stream, ends(latest))


def name_of(pool: torch.Tensor) -> str:
    return pools.setdefault(pool.data_ptr(), f"pool {len(pools)}")


def copying(name: str) -> Callable[..., None]:
    """`copy_pages`, marked."""

    def copy(source: torch.Tensor, froms: list[int], target: torch.Tensor, tos: list[int]) -> None:
        reads, writes = [(name_of(source), p) for p in froms], [(name_of(target), p) for p in tos]
        with access(name, reads, writes):
            side.copy_pages(source, froms, target, tos)

    return copy


fetch, abandon = MappedTransfer.fetch, MappedCopy.abandon
fetched: dict[int, tuple[MappedCopy, int]] = {}
"""Copies from a peer, with the number of their access, by their identity."""


def fetching(transfer: MappedTransfer, *pages: Any) -> MappedCopy:
    """`MappedTransfer.fetch`, remembered."""
    copy = fetch(transfer, *pages)
    fetched[id(copy)] = copy, latest
    return copy


def abandoning(copy: MappedCopy, how: Callable[[MappedCopy], None] = abandon) -> None:
    """`MappedCopy.abandon`: the receiver needs what is read no more, only the place where it is written."""
    how(copy)
    note(torch.cuda.current_stream().cuda_stream, drops(fetched[id(copy)][1]))


forward = ModelRunner._forward


def computing(runner: ModelRunner, batch: Batch, *rest: Any) -> torch.Tensor:
    """`ModelRunner._forward`, marked: it reads all pages of its sequences, and writes where new tokens go."""
    pool, size = name_of(runner.memory.pages), runner.memory.pages.shape[3]
    reads, writes = [], []
    for length, context, pages in zip(batch.lengths, batch.contexts, batch.pages, strict=True):
        reads += [(pool, page) for page in pages[: -(-context // size)]]
        writes += [(pool, page) for page in pages[(context - length) // size : -(-context // size)]]
    if runner.state is not None:
        parts, each = name_of(runner.state.delta), runner.memory.snapshot_pages
        writes += [(parts, slot * each + part) for slot in batch.slots for part in range(each)]
    with access("a step", reads, writes):
        return forward(runner, batch, *rest)


def swapping(preset: str, layers: int, shape: dict[str, Any], **settings: Any) -> dict[str, int]:
    """Conversations that do not fit the pool together, in turns: pages go to host memory and come back."""
    built = engine(preset, layers, shape, **SETTINGS | settings)
    running, histories = built.engine, fresh(16, 150, seed=1)
    for turn in range(4):
        for i, history in enumerate(histories):
            add(running, f"{turn} {i}", history, greedy(8))
        for step in count():
            if not busy(running):
                break
            running.admit()
            running.step()
            if step % 6 == 5 and len(running.running) > 1:  # while a step works on it
                running.abort(running.running[-1].turn)
        histories = [history + new for history, new in zip(histories, fresh(16, 40, seed=turn + 2), strict=True)]
    assert running.host is not None
    counted = {"offloaded": running.host.offloaded, "restored": running.host.restored}
    if running.snapshots is not None:
        counted |= {"saved": running.snapshots.saved, "used": running.snapshots.used}
    return counted


class Side:
    """One of two workers without their processes, with a stream for its steps; `sent` is on its way to the other."""

    def __init__(self, name: str, number: int, preset: str, shape: dict[str, Any]) -> None:
        self.name = name
        self.stream = torch.cuda.Stream()
        with torch.cuda.stream(self.stream):
            self.built = engine(preset, 2, shape, **SETTINGS | {"swap_space": 2**22})
        self.sent: list[Message] = []
        self.engine, memory = self.built.engine, self.built.memory
        self.layout = "pair"
        info = msgspec.structs.replace(memory.info(self.layout), pid=number)
        self.peer = Peer(name, 1, name, info)
        self.handoffs = Handoffs(
            self.engine,
            memory.shape.bytes,
            self.layout,
            60.0,
            lambda to, body: self.sent.append(body),
            lambda peer: MappedTransfer(memory, peer),
        )

    def round(self, heard: list[Message], other: str) -> None:
        """As `Worker.work`."""
        with torch.cuda.stream(self.stream):
            for message in heard:
                self.handoffs.handle(other, message)
            self.handoffs.sender.expire()
            self.handoffs.receiver.poll()
            for sequence in self.engine.admit():
                self.handoffs.receiver.request(sequence)
            step = self.engine.step()
            for sequence, first in step.prefilled:
                self.handoffs.sender.publish(sequence, first)
            self.handoffs.receiver.outputs.clear()


def handing_over() -> dict[str, int]:
    """Prompts that one worker prefills for the other, which decodes; some turns are aborted while pages arrive."""
    p, d = (Side(name, number, "llama-3-8b", SHAPE) for number, name in enumerate(("p", "d"), 1))
    words = {s.peer.pool.pid: s.built.memory.bytes.view(torch.int64) for s in (p, d)}
    sent = {"published": 0, "asked": 0, "seen arriving": 0, "aborted": 0}
    with patch.object(mapped, "map_pool", lambda pool, device: words[pool.pid]):
        for us, other in ((p, d), (d, p)):
            with torch.cuda.stream(us.stream):
                us.handoffs.set_peers([other.peer])
        histories = fresh(8, 150, seed=3)
        for turn in range(4):
            for i, history in enumerate(histories):
                where = {"prefill_at": "p", "share_history": turn > 0}
                root = root_hash(d.layout)
                d.engine.add(Sequence(f"{turn} {i}", history, greedy(8), i, root, **where))  # type: ignore[arg-type]
            while True:
                to_d, p.sent = p.sent, []
                to_p, d.sent = d.sent, []
                p.round(to_p, "d")
                d.round(to_d, "p")
                sent["published"] += sum(isinstance(message, Publish) and bool(message.pages) for message in to_d)
                sent["asked"] += sum(isinstance(message, Prefill) for message in to_p)
                if arriving := [turn for turn, pull in d.handoffs.receiver.pulls.items() if pull.arriving]:
                    sent["seen arriving"] += 1
                    if sent["seen arriving"] % 4 == 0:
                        with torch.cuda.stream(d.stream):
                            d.handoffs.receiver.abort(arriving[0])
                            d.engine.abort(arriving[0])
                        sent["aborted"] += 1
                if len(decoding := [s for s in d.engine.running if s.under_way]) > 2:  # a step works on it
                    with torch.cuda.stream(d.stream):
                        d.engine.abort(decoding[-1].turn)
                if not (busy(d.engine) or busy(p.engine) or d.sent or p.sent or d.handoffs.receiver.pulls):
                    break
            histories = [history + new for history, new in zip(histories, fresh(8, 40, seed=turn + 9), strict=True)]
    return sent


BROKEN: dict[str, tuple[type, dict[str, Any]]] = {
    "": (side.SideStream, {"drain": side.SideStream.drain}),
    "follow": (side.SideStream, {"follow": lambda self: None}),
    "lead": (side.SideStream, {"lead": lambda self: None}),
    "stored": (MappedCopy, {"stored": True, "seconds": 0.0}),
    "abandon": (MappedCopy, {"abandon": lambda self: abandoning(self, lambda copy: None)}),
}
"""Rules of order, and what breaks them."""
SCENES = {
    "swapping": partial(swapping, "llama-3-8b", 2, SHAPE, swap_space=2**22),
    "snapshots": partial(swapping, "qwen3-next-80b-a3b", 4, RECURRENT, swap_space=2**24, kv_cache_memory=2**24),
    "handing over": handing_over,
}


def main() -> None:
    scene, broken = sys.argv[1:]
    where, instead = BROKEN[broken]
    with (
        patch.object(swap, "copy_pages", copying("a copy to or from the host")),
        patch.object(mapped, "copy_pages", copying("a copy from a peer")),
        patch.object(states, "copy_pages", copying("a copy of a state")),
        patch.object(ModelRunner, "_forward", computing),
        patch.object(MappedTransfer, "fetch", fetching),
        patch.object(MappedCopy, "abandon", abandoning),
        patch.multiple(where, **instead),
        logged() as log,
    ):
        counted = SCENES[scene]()
    streams: dict[str, set[int]] = {}
    for one in accesses(log.lines):
        streams.setdefault(one.name, set()).add(one.stream)
    found = {"counted": counted, "streams": {name: sorted(on) for name, on in streams.items()}}
    print(json.dumps(found | {"unordered": unordered(log.lines)}))


if __name__ == "__main__":
    main()
