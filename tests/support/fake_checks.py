"""Checks as scripts/gpu_check.py has them, that need no GPU and go wrong in every way. Real processes run them."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from typing import Any

from scripts.gpu.checks import Check, Kind, Stage
from scripts.gpu.setting import Figure, Figures, Setting

HERE = "tests.support.fake_checks"


def check(name: str, seconds: float = 20.0, kind: Kind = Kind.CORRECTNESS, **arguments: Any) -> Check:
    """One whose function has the first word of its name."""
    return Check(name, kind, f"{HERE}:{name.split()[0]}", seconds, f"what {name} does", arguments)


def stage(*checks: Check, seconds: float = 60.0, processes: int = 1, prepare: str = "at_once") -> Stage:
    """One that is called smoke, like the first of the real ones."""
    return Stage("smoke", seconds, list(checks), f"{HERE}:{prepare}", processes)


# --- before the first check -----------------------------------------------------------------------------------------


def at_once(run: Setting) -> None:
    """Nothing to import."""


def slowly(run: Setting) -> None:
    """As on a machine that reads its libraries for the first time."""
    time.sleep(1.5)


def never(run: Setting) -> None:
    raise ImportError("no such library")


# --- checks ---------------------------------------------------------------------------------------------------------


def fine(run: Setting) -> Figures:
    yield Figure("process", os.getpid())
    yield Figure("errors", 0, "", "==", 0)


def wrong(run: Setting) -> Figures:
    yield Figure("a | b", 0.5, "ms", "<=", 0.25)
    yield Figure("never a number", float("nan"), "", "<=", 1.0)


def broken(run: Setting) -> Figures:
    yield Figure("before", 1)
    raise RuntimeError("it broke")


def crash(run: Setting) -> Figures:
    yield Figure("before", 1)
    print("last words", file=sys.stderr)
    os.abort()


def hang(run: Setting) -> Figures:
    """With a process of its own, as servers are."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    yield Figure("child", child.pid)
    (run.folder / "child").write_text(f"{child.pid}")
    time.sleep(600)


def unusable(run: Setting) -> Figures:
    """Leaves a device that answers nothing any more, like one after an illegal access."""

    def sync() -> None:
        raise RuntimeError("an illegal memory access was encountered")

    run.sync = sync  # type: ignore[method-assign]
    yield Figure("process", os.getpid())


def absent(run: Setting) -> Figures:
    import no_such_module

    yield Figure("never", no_such_module.value)


def together(run: Setting, others: int) -> Figures:
    """Ends when as many run at the same time. Each process has a folder of its own beside the others'."""
    (run.folder.parent / f"{os.getpid()}.here").touch()
    end = time.monotonic() + 15
    while len(list(run.folder.parent.glob("*.here"))) < others and time.monotonic() < end:
        time.sleep(0.02)
    yield Figure("at the same time", len(list(run.folder.parent.glob("*.here"))), "", "==", others)
