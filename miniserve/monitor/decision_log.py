"""The decision log: every placement and what came of it, as JSON lines."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import msgspec

from miniserve.config import ConfigError
from miniserve.scheduler.records import Record

log = logging.getLogger("miniserve.decisions")


class DecisionLog:
    """Appends to `path`; the first line of a run says which policy it had, and what its clock showed at which time.

    Raises `ConfigError` if the file cannot be written to. Once it cannot later, that is said, and serving goes on.
    """

    def __init__(self, path: str, policy: str, now: float) -> None:
        try:
            self._file = Path(path).expanduser().open("ab", buffering=0)
        except (OSError, RuntimeError) as error:  # the latter for a home directory of nobody
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(f"--decision-log {path!r} cannot be written to: {reason}.") from error
        self._broken = False
        self._line({"kind": "start", "policy": policy, "time": now, "unix_time": time.time()})

    def write(self, record: Record) -> None:
        """One more line."""
        self._line(record)

    def close(self) -> None:
        """No more lines; safe to call twice."""
        self._file.close()

    def _line(self, content: object) -> None:
        if self._broken:
            return
        try:
            self._file.write(msgspec.json.encode(content) + b"\n")
        except (OSError, ValueError) as error:
            self._broken = True
            log.error("the decision log ends here: %s", error)
