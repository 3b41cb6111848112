"""KV pages from one process to another on the same device: the bytes, and how fast."""

from __future__ import annotations

import hashlib
import multiprocessing
import random
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from multiprocessing.connection import Connection
from typing import Any

import torch

from miniserve.cluster.messages import Peer
from miniserve.kv.memory import KVMemory, PageShape
from miniserve.kv.transfer.door import Door
from miniserve.kv.transfer.interface import Transfer, connect
from miniserve.kv.transfer.mapped import MappedTransfer
from miniserve.kv.transfer.pair import PairTransfer
from miniserve.model.config import ModelConfig
from scripts.gpu import ceilings
from scripts.gpu.common import drop_engine, model_folder, read_json
from scripts.gpu.setting import Figure, Figures, Setting

LAYOUT = "gpu-check"
TOKENS = 16384
CHUNK = 8192
"""Tokens of a publication: a prefiller's step on CUDA."""
PATIENCE = 60.0


def peer_of(name: str, memory: KVMemory) -> Peer:
    """A pool as its owner announces it."""
    return Peer(name, 1, "", memory.info(LAYOUT))


def new_memory(device: str, shape: PageShape, num_pages: int, seed: int) -> KVMemory:
    """A pool of random bytes, among them all kinds of NaN."""
    memory = KVMemory(shape, num_pages, torch.device(device))
    flat = memory.pages.view(torch.uint8)
    flat.random_(0, 256, generator=torch.Generator(device).manual_seed(seed))
    if device != "cpu":
        torch.cuda.synchronize()
    return memory


def hashes(memory: KVMemory, pages: list[int]) -> list[str]:
    """Of what is in these pages, as the host sees it."""
    return [hashlib.sha256(memory.pages[p].contiguous().view(torch.uint8).cpu().numpy()).hexdigest() for p in pages]


def way(memory: KVMemory, us: str, peer: Peer, run_dir: str, nccl: bool) -> Transfer:
    """How pages come from `peer`: as between workers, or by NCCL."""
    door = Door((us, 1), run_dir, b"key")
    if nccl:
        from miniserve.kv.transfer.nccl import Nccl, nccl_transfer

        return nccl_transfer(Nccl(memory), door, peer)
    transfer = connect(memory, memory.info(LAYOUT), door, peer, "auto")
    if transfer is None:
        raise RuntimeError("connect() found no way between two pools on this device")
    return transfer


def fetch(transfer: Transfer, publications: list[list[int]], ours: list[int]) -> None:
    """Get the pages of each publication into `ours`, in order; all of it is there afterwards."""
    left, end = iter(ours), time.monotonic() + PATIENCE
    for copy in [transfer.fetch(pages, list(islice(left, len(pages)))) for pages in publications]:
        while not copy.stored:
            if time.monotonic() > end:
                raise TimeoutError("pages did not come")


def other(control: Connection, device: str, shape: PageShape, num_pages: int, run_dir: str, nccl: bool) -> None:
    """The second process: fetches and sends hashes when asked to."""
    if device != "cpu":
        torch.cuda.set_device(torch.device(device).index or 0)
    memory = new_memory(device, shape, num_pages, seed=2)
    control.send(peer_of("other", memory))
    transfer = way(memory, "other", control.recv(), run_dir, nccl)
    while job := control.recv():
        what, *rest = job
        if what == "fetch":
            fetch(transfer, *rest)
            control.send(None)
        else:
            control.send(hashes(memory, *rest))
    transfer.close()


@contextmanager
def pair(
    run: Setting, shape: PageShape, num_pages: int, nccl: bool = False
) -> Iterator[tuple[KVMemory, Transfer, Any]]:
    """Our pool, the way to the other process's, and a function that gives it commands. With `nccl` that is on the
    second GPU, where there is one."""
    memory = new_memory(run.device, shape, num_pages, seed=1)
    run_dir = tempfile.mkdtemp(prefix="handoff-")  # a short path, as sockets want it
    context = multiprocessing.get_context("spawn")
    control, theirs = context.Pipe()
    device = "cuda:1" if nccl and torch.cuda.device_count() > 1 else run.device
    process = context.Process(target=other, args=(theirs, device, shape, num_pages, run_dir, nccl), daemon=True)
    process.start()
    theirs.close()
    try:
        peer = _heard(control)
        control.send(peer_of("here", memory))
        transfer = way(memory, "here", peer, run_dir, nccl)

        def command(*job: Any) -> Any:
            control.send(job)
            return _heard(control)

        yield memory, transfer, command
        transfer.close()  # before the other process: its memory must outlive our mapping
        control.send(None)
        process.join(10)
    finally:
        process.terminate()
        process.join(10)
        control.close()


def _heard(control: Connection) -> Any:
    if not control.poll(PATIENCE):
        raise TimeoutError("the other process says nothing")
    return control.recv()


def same_bytes_by_nccl(run: Setting) -> Figures:
    """As `same_bytes`, by NCCL: between two GPUs, or on one with a NCCL that has two ranks there (2.30 or later)."""
    if not run.cuda or (torch.cuda.device_count() < 2 and torch.cuda.nccl.version() < (2, 30)):
        yield Figure("not run", "needs two GPUs, or NCCL 2.30 on one")
    else:
        yield from same_bytes(run, nccl=True)


def same_bytes(run: Setting, nccl: bool = False) -> Figures:
    """Pages in both directions at once, scattered in either pool, and nothing else touched."""
    half = 8 if run.small else 64
    shape = PageShape(layers=3, page_tokens=16, kv_heads=2, head_dim=64, dtype=torch.bfloat16)
    everything, pick = list(range(2 * half)), random.Random(0)
    with pair(run, shape, 2 * half, nccl) as (memory, transfer, command):
        ways = (PairTransfer, "NCCL") if nccl else (MappedTransfer, "mapped")
        yield Figure("way", ways[1] if isinstance(transfer, ways[0]) else "another", "", "==", ways[1])
        # Lower halves are given away, upper halves are written to.
        sent, back = pick.sample(range(half), half // 2), pick.sample(range(half), half // 2)
        landing, theirs = pick.sample(range(half, 2 * half), half // 2), pick.sample(range(half, 2 * half), half // 2)
        before_here, before_there = hashes(memory, everything), command("hash", everything)
        third = len(sent) // 3
        chunks = [(sent[:third], back[:third]), (sent[third:], back[third:])]
        fetch(transfer, [coming for _, coming in chunks], landing)
        command("fetch", [going for going, _ in chunks], theirs)
        after_here, after_there = hashes(memory, everything), command("hash", everything)
        wrong_here = sum(after_here[a] != before_there[b] for a, b in zip(landing, back, strict=True))
        wrong_there = sum(after_there[a] != before_here[b] for a, b in zip(theirs, sent, strict=True))
        yield Figure("pages that arrived here with another hash", wrong_here, f"of {half // 2}", "==", 0)
        yield Figure("pages that arrived there with another hash", wrong_there, f"of {half // 2}", "==", 0)
        rest_here = sum(after_here[p] != before_here[p] for p in everything if p not in landing)
        rest_there = sum(after_there[p] != before_there[p] for p in everything if p not in theirs)
        yield Figure("other pages that changed", rest_here + rest_there, "", "==", 0)


def speed(run: Setting, preset: str) -> Figures:
    """All pages of 16k tokens, in publications of a step, as a share of what a copy of as many bytes takes."""
    drop_engine(run)
    config = ModelConfig.from_hf(read_json(model_folder(run, preset) / "config.json"))
    shape = PageShape(config.kv_layers, 16, config.kv_heads, config.head_dim, torch.bfloat16)
    count, chunk = (TOKENS // 16, CHUNK // 16) if not run.small else (64, 32)
    ceiling = ceilings.measured(run)
    with pair(run, shape, 2 * count) as (memory, transfer, command):
        yield Figure("way", "mapped" if isinstance(transfer, MappedTransfer) else "another")
        times = []
        for repeat in range(6):
            order = random.Random(repeat).sample(range(count), count)
            publications = [order[i : i + chunk] for i in range(0, count, chunk)]
            ours = random.Random(-repeat).sample(range(count, 2 * count), count)
            begun = time.perf_counter()
            fetch(transfer, publications, ours)
            times.append(time.perf_counter() - begun)
        taken = sorted(times[1:])[2]
        wrong = sum(a != b for a, b in zip(hashes(memory, ours[:8]), command("hash", order[:8]), strict=True))
        yield Figure("pages with another hash", wrong, "of 8", "==", 0)
        moved = count * shape.bytes
        yield Figure("moved", moved / 1e9, "GB")
        yield Figure("time", taken * 1e3, "ms")
        yield Figure("share of copy bandwidth", 2 * moved / taken / ceiling.copy, "", ">=", 0.80)
