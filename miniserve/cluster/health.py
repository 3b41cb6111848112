"""When a worker counts as dead, and when it is started again. Pure: no clock, no processes."""

import math
from collections import deque

FIRST_DELAY = 0.5
MOST_DEATHS = 5
"""Deaths within `WINDOW` after which a worker is not started again: what ends it will end it once more."""
WINDOW = 600.0
SLOWER = 5.0
"""A worker that loads again may be silent for so many times what its whole first start took, if that is longer than the
timeout. Healthy silences (imports, the largest tensor, a step on cold weights) are parts of a start, and the first one
was measured on this machine, with all workers loading at once: what is silent for longer is not slow, it hangs."""


class Health:
    """The signs of life of all workers. Times and `timeout` are in seconds."""

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._heard: dict[str, float] = {}
        self._loading: dict[str, float] = {}
        """Workers that load, and when they were started."""
        self._first_start: dict[str, float] = {}
        """How long each worker's first start took that ended well."""
        self._deaths: dict[str, deque[float]] = {}

    def started(self, name: str, now: float) -> None:
        """A worker's process has been started and loads: each step of its progress is a sign of life."""
        self._loading[name] = self._heard[name] = now

    def ready(self, name: str, now: float) -> None:
        """It has loaded and serves: an idle worker says something once a second, a busy one after each step."""
        self._heard[name] = now
        self._first_start.setdefault(name, now - self._loading.pop(name))

    def forget(self, name: str) -> None:
        """It is not expected any more."""
        for known in (self._heard, self._loading, self._first_start, self._deaths):
            known.pop(name, None)

    def heard(self, name: str, now: float) -> None:
        self._heard[name] = now

    def excuse(self, seconds: float) -> None:
        """The frontend itself was stopped for so long: no worker is blamed for its silence."""
        self._heard = {name: at + seconds for name, at in self._heard.items()}

    def silent(self, now: float) -> dict[str, float]:
        """Workers that are silent for too long, hung or stopped, and for how many seconds."""
        return {name: now - at for name, at in self._heard.items() if now - at > self._longest_silence(name)}

    def _longest_silence(self, name: str) -> float:
        if name not in self._loading:
            return self._timeout
        if name not in self._first_start:
            # How long this model takes on this machine is not known yet (a cold disk, kernels to compile), so the very
            # first start may be silent for ever: a person watches its progress, and can end it.
            return math.inf
        return max(self._timeout, SLOWER * self._first_start[name])

    def died(self, name: str, now: float) -> float | None:
        """A worker has ended. Seconds until it should be started again, doubled with each death; None for no more."""
        self._heard.pop(name, None)
        self._loading.pop(name, None)
        deaths = self._deaths.setdefault(name, deque())
        deaths.append(now)
        while now - deaths[0] > WINDOW:
            deaths.popleft()
        if len(deaths) >= MOST_DEATHS:
            return None
        return FIRST_DELAY * 2.0 ** (len(deaths) - 1)
