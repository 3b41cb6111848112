"""Pools of random bytes on a CPU, for tests that move pages between them."""

from __future__ import annotations

import os

import torch

from miniserve.cluster.messages import Peer, PoolInfo
from miniserve.kv.memory import KVMemory, PageShape
from miniserve.kv.transfer.door import Door
from miniserve.kv.transfer.pair import Line, PairTransfer

PAGES = 24
SHAPES = {
    "bf16": PageShape(layers=3, page_tokens=16, kv_heads=2, head_dim=64, dtype=torch.bfloat16),
    "big": PageShape(layers=32, page_tokens=64, kv_heads=8, head_dim=64, dtype=torch.bfloat16),  # a pool of 100 MB
    "odd": PageShape(layers=1, page_tokens=1, kv_heads=1, head_dim=3, dtype=torch.int8),  # 6 bytes
}


def new_memory(shape: PageShape, seed: int) -> KVMemory:
    """A pool of random bytes, among them all kinds of NaN."""
    memory = KVMemory(shape, PAGES, torch.device("cpu"))
    memory.shared.bytes.random_(0, 256, generator=torch.Generator().manual_seed(seed))
    return memory


def memory_as_on_a_gpu(shape: PageShape, num_pages: int, device: torch.device, *more: int) -> KVMemory:
    """A pool on a CPU that has a scratch page behind the last one, as a GPU's has."""
    made = KVMemory(shape, num_pages + 1, device, *more)
    made.num_pages = num_pages
    return made


def content(memory: KVMemory, pages: list[int]) -> bytes:
    return memory.bytes.numpy()[pages].tobytes()


def peer_of(name: str, epoch: int, memory: KVMemory) -> Peer:
    return Peer(name, epoch, "", PoolInfo(os.getpid(), memory.shared.fd, PAGES, memory.shape.bytes, ""))


def socket_transfer(memory: KVMemory, door: Door, peer: Peer, timeout: float = 30.0) -> PairTransfer:
    """Pages through sockets, as `connect` makes it."""
    return PairTransfer(Line(memory, timeout), Line(memory, timeout), door, peer)


DEVICE_PAGES = 8
DEVICE_SHAPE = PageShape(layers=2, page_tokens=4, kv_heads=1, head_dim=8, dtype=torch.bfloat16)


def device_memory(seed: int) -> KVMemory:
    """A pool that is laid out as on a GPU: with a scratch page."""
    memory = KVMemory(DEVICE_SHAPE, DEVICE_PAGES, torch.device("cpu"))
    memory.shared = None
    memory.pages = DEVICE_SHAPE.view(torch.zeros((DEVICE_PAGES + 1) * DEVICE_SHAPE.bytes, dtype=torch.uint8))
    memory.bytes.random_(0, 256, generator=torch.Generator().manual_seed(seed))
    return memory
