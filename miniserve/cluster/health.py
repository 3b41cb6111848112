"""When a worker counts as dead, and when it is started again. Pure: no clock, no processes."""

from __future__ import annotations

from collections import deque

FIRST_DELAY = 0.5
LONGEST_DELAY = 30.0
MOST_DEATHS = 5
"""Deaths within `WINDOW` after which a worker is not started again: what ends it will end it once more."""
WINDOW = 600.0


class Health:
    """The signs of life of all workers. Times and `timeout` are in seconds."""

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._heard: dict[str, float] = {}
        self._deaths: dict[str, deque[float]] = {}

    def heard(self, name: str, now: float) -> None:
        """A worker that serves has said something; an idle one does so once a second, a busy one after each step."""
        self._heard[name] = now

    def silent(self, now: float) -> list[str]:
        """Workers that have served and are not heard of any more: hung, or stopped."""
        return [name for name, at in self._heard.items() if now - at > self._timeout]

    def died(self, name: str, now: float) -> float | None:
        """A worker has ended. Seconds until it should be started again, doubled with each death; None for no more."""
        self._heard.pop(name, None)
        deaths = self._deaths.setdefault(name, deque())
        deaths.append(now)
        while now - deaths[0] > WINDOW:
            deaths.popleft()
        if len(deaths) >= MOST_DEATHS:
            return None
        return min(FIRST_DELAY * 2.0 ** (len(deaths) - 1), LONGEST_DELAY)
