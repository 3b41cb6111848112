"""What was observed of all conversations together: what to expect of one that has shown little of itself yet."""

from __future__ import annotations

from miniserve.scheduler.conversations import Conversation
from miniserve.scheduler.history import TURNS, TurnRecord
from miniserve.scheduler.observations import Recent

RESERVED_OUTPUT = 256
"""Output tokens expected of a turn before any was seen."""
OUTPUT_QUANTILE = 0.9
"""How many of ten turns should get by with the pages they were given at their start."""


class Fleet:
    """Outputs, gaps and the chance of another turn, of the turns that ended lately."""

    def __init__(self) -> None:
        self._outputs = Recent()
        self._gaps = Recent()
        self._ended = [0] * (TURNS + 1)
        """By the number of a turn: how many have ended."""
        self._continued = [0] * (TURNS + 1)
        """And after how many of them another one came."""

    def arrived(self, conversation: Conversation, gap: float) -> None:
        """A turn has come, `gap` seconds after the one before it (negative where there was none)."""
        if gap >= 0:
            self._gaps.add(gap)
            self._continued[min(conversation.turns, TURNS)] += 1

    def ended(self, record: TurnRecord) -> None:
        """A turn has ended."""
        self._outputs.add(record.output)
        self._ended[min(record.turn, TURNS)] += 1

    def output(self, conversation: Conversation, max_tokens: int | None) -> int:
        """Tokens a turn should be given room for: a high quantile of its own conversation's outputs, else of all; never
        more than it may generate."""
        own = conversation.history.quantile("output", OUTPUT_QUANTILE)
        expected = self._outputs.quantile(OUTPUT_QUANTILE, RESERVED_OUTPUT) if own is None else own
        return max(1, min(int(expected), max_tokens or int(expected)))

    def outlook(self, conversation: Conversation, turn: int) -> tuple[float, float]:
        """After turn number `turn`: the gap to expect in seconds (the conversation's own median, else that of all), and
        the chance that another turn comes at all (the share of such turns that were followed by one).

        The chance begins at 2/3: agents' conversations go on, and those that rest now may still do.
        """
        own = conversation.history.quantile("gap", 0.5)
        gap = self._gaps.quantile(0.5, 0.0) if own is None else own
        n = min(turn, TURNS)
        return gap, min((self._continued[n] + 2) / (self._ended[n] + 3), 1.0)
