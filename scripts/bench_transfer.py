#!/usr/bin/env python3
"""What the two ways of moving KV pages cost beside a plain copy of the same bytes, on this machine.

  scripts/bench_transfer.py [--pages 128] [--chunk 32] [--repeats 15] [--json FILE.json]

The pages are those of SmolLM2-135M in bf16. `mapped` is held against memcpy between two shared memories in one process,
`collective` against a loopback TCP connection between two processes with raw sockets. A second process has the source
pool, as in a cluster; it publishes chunk after chunk and everything from the request to the last stored page counts.
All variants take turns within each repeat, so that a noisy neighbour disturbs all of them; figures are medians.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import socket
import statistics
import tempfile
import time
from multiprocessing.connection import Connection

import numpy as np
import torch

from miniserve.cluster.messages import Peer, PoolInfo
from miniserve.kv.memory import KVMemory, PageShape
from miniserve.kv.transfer.door import Door
from miniserve.kv.transfer.interface import Transfer
from miniserve.kv.transfer.mapped import MappedTransfer
from miniserve.kv.transfer.pair import Line, PairTransfer
from miniserve.worker.sizing import keep_freed_memory
from scripts.harness import flags, in_turns, write

SHAPE = PageShape(layers=30, page_tokens=16, kv_heads=3, head_dim=64, dtype=torch.bfloat16)
BASELINES = {"mapped": ("memcpy, page by page", "memcpy, at once"), "collective": ("raw sockets",)}
VARIANTS = [*BASELINES["mapped"], "mapped", *BASELINES["collective"], "collective"]


def peer_of(name: str, memory: KVMemory) -> Peer:
    """What the owner of `memory`, this process, sends to others."""
    assert memory.shared is not None
    return Peer(name, 1, "", PoolInfo(os.getpid(), memory.shared.fd, memory.num_pages, memory.shape.bytes, ""))


def prepare() -> None:
    """As a worker starts."""
    keep_freed_memory()
    torch.set_num_threads(1)


def source(control: Connection, run_dir: str, peer: Peer, num_pages: int) -> None:
    """The other process: it publishes what `control` asks for."""
    prepare()
    memory = KVMemory(SHAPE, num_pages, torch.device("cpu"))
    memory.pages.view(torch.int16).random_()
    asked = PairTransfer(Line(memory), Line(memory), Door(("source", 1), run_dir, b"key"), peer)
    control.send(peer_of("source", memory))
    wire = socket.create_connection(("127.0.0.1", control.recv()))
    assert memory.shared is not None
    everything = memory.shared.bytes.numpy().data
    while (job := control.recv()) is not None:
        variant, chunks = job
        if variant == "raw sockets":
            wire.sendall(everything)
            continue
        for chunk in chunks:
            control.send(chunk)
    asked.close()


class Bench:
    """The receiving process. `spare` times as much memory as is moved lies untouched until it is used."""

    def __init__(self, num_pages: int, chunk: int, spare: int, run_dir: str) -> None:
        self.num_pages, self.chunk = num_pages, chunk
        self.memory = KVMemory(SHAPE, num_pages * (1 + spare), torch.device("cpu"))
        self.memory.pages[:num_pages] = 0
        self.untouched = iter(range(num_pages, self.memory.num_pages, num_pages))
        self.control, theirs = multiprocessing.Pipe()
        us = peer_of("here", self.memory)
        context = multiprocessing.get_context("spawn")
        self.process = context.Process(target=source, args=(theirs, run_dir, us, num_pages), daemon=True)
        self.process.start()
        peer = self.control.recv()
        listener = socket.create_server(("127.0.0.1", 0))
        self.control.send(listener.getsockname()[1])
        self.wire = listener.accept()[0]
        mapped = MappedTransfer(self.memory, peer)
        self.transfers: dict[str, Transfer] = {
            "mapped": mapped,
            "collective": PairTransfer(Line(self.memory), Line(self.memory), Door(("here", 1), run_dir, b"key"), peer),
        }
        self.theirs = mapped._theirs
        self.ours = self.memory.bytes.numpy()

    def run(self, variant: str, touched: bool) -> float:
        """Move all pages once; seconds."""
        first = 0 if touched else next(self.untouched)
        ours = self.ours[first : first + self.num_pages]
        order = random.sample(range(self.num_pages), self.num_pages)
        chunks = [order[i : i + self.chunk] for i in range(0, self.num_pages, self.chunk)]
        begun = time.perf_counter()
        if variant == "memcpy, page by page":
            for page in order:
                ours[page] = self.theirs[page]
        elif variant == "memcpy, at once":
            ours[:] = self.theirs
        elif variant == "raw sockets":
            self.control.send((variant, chunks))
            view = ours.reshape(-1).data
            while view:
                view = view[self.wire.recv_into(view) :]
        else:
            self.control.send((variant, chunks))
            self._fetch(self.transfers[variant], len(chunks), first)
        seconds = time.perf_counter() - begun
        assert np.array_equal(ours, self.theirs), f"{variant}: other bytes than the source's"
        return seconds

    def _fetch(self, transfer: Transfer, publications: int, first: int) -> None:
        """As an engine does it, except that it has nothing else to do."""
        copies = []
        for _ in range(publications):
            pages = self.control.recv()
            copies.append(transfer.fetch(pages, [first + page for page in pages]))
        for copy in copies:
            while not copy.stored:
                time.sleep(1e-5)


def measure(bench: Bench, repeats: int, touched: bool) -> dict[str, float]:
    """GB/s of each variant, medians."""
    # The first use connects and grows buffers.
    runs = in_turns(VARIANTS, repeats, lambda variant: bench.run(variant, touched), warm_up=1 if touched else 0)
    moved = bench.num_pages * SHAPE.bytes
    return {variant: moved / statistics.median(seconds) / 1e9 for variant, seconds in runs.items()}


def main() -> None:
    parser = flags(__doc__)
    parser.add_argument("--pages", type=int, default=128, help="moved each time")
    parser.add_argument("--chunk", type=int, default=32, help="pages of one publication")
    parser.add_argument("--repeats", type=int, default=15)
    args = parser.parse_args()
    prepare()
    fresh = max(3, args.repeats // 3)
    with tempfile.TemporaryDirectory() as run_dir:
        bench = Bench(args.pages, args.chunk, fresh * len(VARIANTS), run_dir)
        touched = measure(bench, args.repeats, touched=True)
        untouched = measure(bench, fresh, touched=False)
        bench.control.send(None)
        bench.process.join(10)
    print(f"{args.pages} pages of {SHAPE.bytes:,} bytes, {args.chunk} a publication; GB/s, medians of {args.repeats}")
    print(f"{'':<24}{'touched before':>16}{'untouched':>12}")
    for variant in VARIANTS:
        print(f"{variant:<24}{touched[variant]:>16.2f}{untouched[variant]:>12.2f}")
    ratios = {}
    for backend, plain in BASELINES.items():
        ratios[backend] = {
            name: figures[backend] / max(figures[baseline] for baseline in plain)
            for name, figures in (("touched", touched), ("untouched", untouched))
        }
        print(
            f"{backend} is {ratios[backend]['touched']:.0%} of the faster plain copy"
            f" ({ratios[backend]['untouched']:.0%} into untouched memory)"
        )
    setting = {"pages": args.pages, "chunk": args.chunk, "repeats": args.repeats, "page_bytes": SHAPE.bytes}
    setting |= {"cpus": os.cpu_count(), "torch": torch.__version__}
    write(args.json, {**setting, "touched_gb_s": touched, "untouched_gb_s": untouched, "ratios": ratios})


if __name__ == "__main__":
    main()
