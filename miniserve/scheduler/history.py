"""What was observed of one conversation, turn by turn, in a few bytes each."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from typing import NamedTuple, get_type_hints

from miniserve.scheduler.observations import quantile

TURNS = 16
"""Turns of a conversation that are remembered one by one: behaviour changes, and memory is bounded."""


FINISHES = ("stop", "length", "abort", "error")


class TurnRecord(NamedTuple):
    """One turn that has ended. Times in seconds; lengths in tokens.

    `arrived` counts from the conversation's first turn, `gap` from the end of the turn before (-1 where none was). The
    phases follow each other: `queued` for a placement, `waited` at its workers for steps of others and for pages,
    `prefill`; these make up the time to the `first_token`; then `decode`. Beside them: `transfer` is the time of
    copying KV, `exposed` what of it began when the prefill was done (so it is part of `decode`) or held up a prefill.
    `home` and `prefill_at` are numbers of workers (-1 for none); `tool` is whether the prompt ended in a tool's result:
    the turn before has called one.
    """

    turn: int
    arrived: float
    gap: float
    prompt: int
    new: int
    cached: int
    output: int
    queued: float
    waited: float
    prefill: float
    transfer: float
    exposed: float
    first_token: float
    decode: float
    moved_pages: int
    home: int
    prefill_at: int
    tool: bool
    runs: int
    finish: int
    """Which of `FINISHES`."""


COLUMNS = len(TurnRecord._fields)
WHOLE = tuple(i for i, kind in enumerate(get_type_hints(TurnRecord).values()) if kind is not float)


class History:
    """The last `TURNS` turns of a conversation, as float32."""

    __slots__ = ("_numbers",)

    def __init__(self) -> None:
        self._numbers = array("f")

    def __len__(self) -> int:
        return len(self._numbers) // COLUMNS

    def __iter__(self) -> Iterator[TurnRecord]:
        for start in range(0, len(self._numbers), COLUMNS):
            row: list[float] = list(self._numbers[start : start + COLUMNS])
            for i in WHOLE:
                row[i] = int(row[i])
            yield TurnRecord(*row)  # type: ignore[arg-type]

    def append(self, record: TurnRecord) -> None:
        """A turn has ended."""
        if len(self) == TURNS:
            del self._numbers[:COLUMNS]
        self._numbers.extend(record)

    def column(self, name: str) -> list[float]:
        """One number of each turn, in their order."""
        return list(self._numbers[TurnRecord._fields.index(name) :: COLUMNS])

    def quantile(self, name: str, q: float, least: float = 0.0) -> float | None:
        """A quantile of one number over turns where it is at least `least`; None without two such turns."""
        values = sorted(value for value in self.column(name) if value >= least)
        return quantile(values, q) if len(values) > 1 else None
