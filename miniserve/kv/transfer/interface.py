"""What every way between two pools does: `Transfer`, and the `Copy` of one publication.

Both sides of a pair hold a `Transfer`. The receiver of a publication fetches its pages; the sender does nothing for
them, its lease keeps them as they are. No call here blocks the engine.
"""

import math
from typing import Protocol


class TransferError(RuntimeError):
    """The pages did not come: the peer is gone, or stuck."""


class Copy(Protocol):
    """Pages on their way to ours."""

    @property
    def seconds(self) -> float:
        """How long they were on their way beside our steps, once `stored`; what `fetch` itself takes comes on top."""

    @property
    def stored(self) -> bool:
        """Whether all are written, so that every reader may read the pages. Raises `TransferError` if they will never
        be; nothing is written to the pages then."""

    def abandon(self) -> None:
        """Give them up. From now on the pages may be given to other sequences: whatever is still written to them is
        written before all that the engine computes, or another copy writes, from here on."""


class Transfer(Protocol):
    """The way between one peer's pool and our own, both directions."""

    def fetch(self, theirs: list[int], ours: list[int], lease: float = math.inf) -> Copy:
        """Begin to write pages `theirs` of the peer's pool, which are complete on its device, to our pages `ours`, as
        many and in this order. If the peer sends them, they do not count when its clock shows more than `lease` at the
        end. Who copies them itself, on the peer's host, reads the same clock."""

    def close(self) -> None:
        """The peer is gone."""
