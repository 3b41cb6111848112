"""Runs the checks of a stage: in order, each within its own limit and all within the stage's."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from scripts.gpu.checks import Check, Kind, Stage
from scripts.gpu.process import Outcome, Process
from scripts.gpu.report import Result, Verdict

LEAST = 3.0
"""A check is not begun when fewer seconds are left of its stage."""
STARTS = 2
"""After so many starts in a row that failed no process is started any more."""


class Run:
    """One stage on one device. `earlier` are results to be taken over where they passed; `changed` is called with
    the result of each check as it ends; `results` are all."""

    def __init__(
        self,
        stage: Stage,
        device: str,
        small: bool,
        earlier: dict[str, Result],
        changed: Callable[[Result], None],
    ) -> None:
        self._stage, self._device, self._small = stage, device, small
        self.results = [_passed_before(earlier, check) or Result.of(check) for check in stage.checks]
        by_name = {result.check: result for result in self.results}
        fresh = [check for check in stage.checks if by_name[check.name].verdict is Verdict.NOT_RUN]
        self._waiting = deque((check, by_name[check.name]) for check in fresh)
        self._lock = threading.Lock()
        self._changed = changed
        self._processes: list[Process] = []
        self._stopped = False
        """By an interrupt."""

    def run(self, seconds: float, folder: Path) -> list[Result]:
        """Run what has not passed before, in so many seconds; `folder` is for files that may go afterwards."""
        self._end = time.monotonic() + seconds
        count = min(self._stage.processes, len(self._waiting))
        self._processes = [
            Process(self._device, self._small, folder / f"{self._stage.name}-{number}", self._stage.prepare)
            for number in range(count)
        ]
        with ThreadPoolExecutor(max(count, 1)) as pool:
            try:
                list(pool.map(self._serve, self._processes))
            except BaseException:  # an interrupt: nothing is waited for
                self._stopped = True
                for process in self._processes:
                    process.kill()
                raise
        while self._waiting:
            _, result = self._waiting.popleft()
            over = time.monotonic() > self._end - LEAST
            result.note = f"the {seconds:.0f} s of its stage were over" if over else "no process starts any more"
        return self.results

    def _serve(self, process: Process) -> None:
        """Give a process one check after the other."""
        failed_starts = 0
        while failed_starts < STARTS and time.monotonic() < self._end - LEAST and not self._stopped:
            with self._lock:
                if not self._waiting:
                    break
                check, result = self._waiting.popleft()
            outcome = process.run(check, self._end)
            failed_starts = 0 if outcome.ready else failed_starts + 1
            with self._lock:
                self._judge(check, result, outcome)
                self._changed(result)
        process.end()

    def _judge(self, check: Check, result: Result, outcome: Outcome) -> None:
        result.figures, result.seconds, result.error = outcome.figures, outcome.seconds, outcome.error
        if outcome.started is not None:
            result.note = f"after {outcome.started:.1f} s in which its process started"
        if outcome.cut or (outcome.error and self._stopped):  # by its own limit it might have passed
            result.note = f"cut off after {outcome.seconds:.0f} s, with its stage"
        elif outcome.error:
            result.verdict = Verdict.FAILED
        elif check.kind is Kind.SPEED and (self._device == "cpu" or self._small):
            result.verdict = Verdict.NOT_JUDGED
        else:
            result.verdict = Verdict.PASSED if all(figure.ok for figure in outcome.figures) else Verdict.FAILED


def _passed_before(earlier: dict[str, Result], check: Check) -> Result | None:
    found = earlier.get(check.name)
    return found if found is not None and found.verdict is Verdict.PASSED else None
