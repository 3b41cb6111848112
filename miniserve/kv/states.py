"""The bytes of recurrent state: a slot for each running sequence, and snapshots of slots in pages of the pool."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from miniserve.cluster.rank_messages import Copied
from miniserve.kv.memory import KVMemory
from miniserve.kv.side import Fence, copy_pages, passing
from miniserve.ops.decoder import DeltaSizes, State


@dataclass(frozen=True)
class StateShape(DeltaSizes):
    """What is kept of a sequence in `layers` layers: the last `taps - 1` inputs of `channels` numbers of a convolution
    in `dtype`, and in float32 what `v_heads` heads have learned, `[k_dim, v_dim]` each."""

    layers: int
    dtype: torch.dtype

    @property
    def delta_bytes(self) -> int:
        return 4 * self.layers * self.v_heads * self.k_dim * self.v_dim

    @property
    def bytes(self) -> int:
        return self.delta_bytes + self.layers * (self.taps - 1) * self.channels * self.dtype.itemsize

    def pages(self, page_bytes: int) -> int:
        """How many pages of a pool a snapshot takes."""
        return -(-self.bytes // page_bytes)


class StateMemory:
    """`slots` slots beside the pool `memory`. `delta` is float32 `[slot, layer, v_head, k_dim, v_dim]`, `conv` is
    `[slot, layer, taps - 1, channels]`. A slot fills `pages` pages, all but the last one wholly. Where the pool has a
    scratch page, on a GPU, both have a scratch slot as well, number `slots`.

    Copies are given to the device in the order of the calls, among its steps: what a step has made is saved after it.
    `tell` hears of each copy before it is made.
    """

    def __init__(
        self, shape: StateShape, slots: int, memory: KVMemory, tell: Callable[[Copied], None] = lambda copied: None
    ) -> None:
        self.slots = slots
        self._tell = tell
        self.pages = shape.pages(memory.shape.bytes)
        self._pool = memory.bytes
        slots += len(self._pool) - memory.num_pages
        self._parts = torch.zeros((slots * self.pages, memory.shape.bytes), dtype=torch.uint8, device=self._pool.device)
        rows, heads = self._parts.view(slots, -1), (shape.v_heads, shape.k_dim, shape.v_dim)
        delta = rows[:, : shape.delta_bytes].view(torch.float32).view(slots, shape.layers, *heads)
        past = rows[:, shape.delta_bytes : shape.bytes].view(shape.dtype)
        self.state = State(past.view(slots, shape.layers, shape.taps - 1, shape.channels), delta)

    def clear(self, slot: int) -> None:
        """The state before the first token."""
        self._tell(Copied("clear", [slot], []))
        self._parts[slot * self.pages : (slot + 1) * self.pages].zero_()

    def save(self, slot: int, pages: list[int]) -> Fence:
        """Copy a slot to pages of the pool, which are complete when the fence is passed."""
        self._tell(Copied("save", [slot], pages))
        copy_pages(self._parts, self._of(slot), self._pool, pages)
        return passing(self._pool.device)

    def load(self, slot: int, pages: list[int]) -> None:
        """Copy a snapshot from pages of the pool to a slot."""
        self._tell(Copied("load", pages, [slot]))
        copy_pages(self._pool, pages, self._parts, self._of(slot))

    def _of(self, slot: int) -> list[int]:
        return list(range(slot * self.pages, (slot + 1) * self.pages))
