"""The decision log: every placement and what came of it, as JSON lines."""

import logging
import time
from pathlib import Path

import msgspec

from miniserve.config import ConfigError
from miniserve.scheduler.records import Record

log = logging.getLogger("miniserve.decisions")


class DecisionLog:
    """Appends to `path`; the first line of a run holds its policy, and its clock beside the time of day.

    Raises `ConfigError` if the file cannot be written to. If a later write fails, that is logged, no more lines are
    written, and serving goes on.
    """

    def __init__(self, path: str, policy: str, now: float) -> None:
        try:
            self._file = Path(path).expanduser().open("ab", buffering=0)
        except (OSError, RuntimeError) as error:  # the latter for the home directory of an unknown user
            reason = getattr(error, "strerror", None) or error
            raise ConfigError(f"--decision-log {path!r} cannot be written to: {reason}.") from error
        self.write({"kind": "start", "policy": policy, "time": now, "unix_time": time.time()})

    def close(self) -> None:
        """No more lines; safe to call twice."""
        self._file.close()

    def write(self, record: Record) -> None:
        if self._file.closed:
            return
        try:
            self._file.write(msgspec.json.encode(record) + b"\n")
        except OSError as error:
            log.error("the decision log ends here: %s", error)
            self.close()
