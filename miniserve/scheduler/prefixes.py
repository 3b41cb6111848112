"""Which worker has seen which beginning of a prompt: system prompts, and tasks that share one."""

from __future__ import annotations

from collections import OrderedDict


class Prefixes:
    """The workers that have computed the first 1, 2, 4, 8, ... pages of prompts, for the last `capacity` of these.

    Powers of two: a prompt of a thousand pages leaves ten entries, most of them shared with others like it; what is
    found is at least half of what was there. Workers evict without telling: it is an estimate.
    """

    def __init__(self, capacity: int = 65_536) -> None:
        self._capacity = capacity
        self._workers: OrderedDict[bytes, tuple[str, ...]] = OrderedDict()

    def add(self, chain: list[bytes], worker: str) -> None:
        """`worker` computes this prompt (`page_chain`)."""
        for page in _powers(len(chain)):
            known = self._workers.pop(chain[page], ())
            self._workers[chain[page]] = known if worker in known else (*known, worker)
        while len(self._workers) > self._capacity:
            self._workers.popitem(last=False)

    def find(self, chain: list[bytes]) -> dict[str, int]:
        """Pages of this prompt that workers have, at least."""
        found: dict[str, int] = {}
        for page in _powers(len(chain)):
            workers = self._workers.get(chain[page])
            if workers is None:
                break
            for worker in workers:
                found[worker] = page
        return found

    def drop(self, worker: str) -> None:
        """`worker` is gone, and all that it had."""
        for digest, known in self._workers.items():
            if worker in known:
                self._workers[digest] = tuple(name for name in known if name != worker)


def _powers(length: int) -> list[int]:
    """1, 2, 4, ... below `length`."""
    return [1 << n for n in range(max(length - 1, 0).bit_length())]
