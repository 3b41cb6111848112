"""Waiting for what happens in another thread or process."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

PROMPT = 2.0
"""Seconds that anything "at once" may take where other programs are busy too."""


def until(condition: Callable[[], object], seconds: float = 20.0) -> None:
    """Return when the condition holds; fail when it does not within `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.002)


def stop(pid: int) -> None:
    """SIGSTOP a process; all of its threads have stopped when this returns."""
    os.kill(pid, signal.SIGSTOP)
    threads = Path(f"/proc/{pid}/task")
    until(lambda: all(") T " in (thread / "stat").read_text() for thread in threads.iterdir()))
