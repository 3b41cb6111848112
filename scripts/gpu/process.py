"""The process in which checks run: what they crash or leave hanging goes with it."""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import signal
import time
import traceback
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from scripts.gpu.checks import Check, call
from scripts.gpu.setting import Figure, Setting

STARTING = 90.0
"""Seconds that a process may take to import torch and transformers on a machine that reads them for the first time."""
SHOWN = 3000
"""So many characters are kept of what a process has printed before it ended."""


class Ready:
    """Sent when all is imported: only now the clock of a check may start."""


@dataclass(frozen=True)
class Done:
    """Sent at a check's end, with the error that ended it, if any; and whether the process `ends` too, as it is of no
    more use."""

    error: str
    ends: bool = False


@dataclass
class Outcome:
    """What a process found, in how many `seconds`; `cut` where the stage's end came first. `started` are the seconds
    that it took to be `ready` if it was started for this check."""

    figures: list[Figure] = field(default_factory=list)
    error: str = ""
    cut: bool = False
    seconds: float = 0.0
    started: float | None = None
    ready: bool = True


def worker(control: Connection, device: str, small: bool, folder: str, prepare: str) -> None:
    """Runs the checks it is sent, and sends each figure as it comes. Ends itself after an error that may have left
    the device unusable."""
    os.setsid()  # to end it with its children
    with (Path(folder) / "output.txt").open("w") as out:
        os.dup2(out.fileno(), 1)
        os.dup2(out.fileno(), 2)
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1)  # where it hangs, in C too
    os.environ["MINISERVE_CACHE"] = str(Path(folder) / "cache")
    run = Setting(device, small, Path(folder))
    try:
        call(prepare, run)
    except BaseException:
        control.send(Done(traceback.format_exc(), ends=True))
        return
    control.send(Ready())
    while (check := control.recv()) is not None:
        error = ""
        try:
            for figure in check.run(run):
                control.send(figure)
        except BaseException:
            error = traceback.format_exc()
        try:
            run.sync()
            run.release()
        except Exception as broken:
            control.send(Done(f"{error}\nThe device is unusable: {broken}", ends=True))
            return
        control.send(Done(error))


class Process:
    """A process that is started when it is needed, and again after it has ended. `folder` is its own, for files."""

    def __init__(self, device: str, small: bool, folder: Path, prepare: str) -> None:
        self._arguments = device, small, str(folder), prepare
        self._output = folder / "output.txt"
        folder.mkdir(parents=True, exist_ok=True)
        self._process: Any = None
        self._control: Any = None

    def run(self, check: Check, end: float) -> Outcome:
        """Run a check for its seconds at most, and no longer than until `end` (of time.monotonic())."""
        outcome = Outcome()
        if self._process is None:
            begun = time.monotonic()
            self._start()
            self._hear(outcome, begun + STARTING, end)
            outcome.started = time.monotonic() - begun
            if outcome.error:
                outcome.ready, outcome.error = False, f"its process did not start: {outcome.error}"
                return outcome
        begun = time.monotonic()
        try:
            self._control.send(check)
        except OSError:
            self._ended(outcome)
        else:
            self._hear(outcome, begun + check.seconds, end)
        outcome.seconds = time.monotonic() - begun
        return outcome

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._control, theirs = context.Pipe()
        self._process = context.Process(target=worker, args=(theirs, *self._arguments))
        self._process.start()
        theirs.close()

    def _hear(self, outcome: Outcome, limit: float, end: float) -> None:
        """Everything up to `Ready` or `Done`, or until its own end, its `limit` or the stage's `end`. It is ended where
        it is of no more use."""
        begun = time.monotonic()
        try:
            while self._control.poll(max(min(limit, end) - time.monotonic(), 0)):
                heard = self._control.recv()
                if isinstance(heard, Figure):
                    outcome.figures.append(heard)
                    continue
                if isinstance(heard, Done):
                    outcome.error = heard.error
                    if heard.ends:
                        self.end()
                return
        except (EOFError, OSError):
            self._ended(outcome)
            return
        outcome.cut = end < limit
        outcome.error = f"not done after {time.monotonic() - begun:.0f} s; it was at:\n{self._stack()}"
        self.end()

    def _ended(self, outcome: Outcome) -> None:
        self._process.join(5)
        outcome.error = f"its process ended with exit code {self._process.exitcode}\n{self._said()}"
        self.end()

    def _stack(self) -> str:
        """Where it is, by its own words."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(self._process.pid, signal.SIGUSR1)
            time.sleep(0.3)
        return self._said()

    def _said(self) -> str:
        try:
            return self._output.read_text("utf-8", "replace")[-SHOWN:]
        except OSError:
            return ""

    def end(self) -> None:
        """End it and its children."""
        if self._process is not None:
            self.kill()
            self._process.join(2)
            self._control.close()
            self._process = None

    def kill(self) -> None:
        """The same from another thread than the one that hears it."""
        process = self._process
        if process is None:
            return
        for how in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, how)
            process.join(2)
        process.kill()  # one that has not even begun has no group of its own
