#!/usr/bin/env python3
"""Everything that only a GPU can show, in stages that together take 7 minutes, without network.

  scripts/gpu_check.py --out NAME        all stages, each whatever the one before has found
  scripts/gpu_check.py smoke --out NAME  one: smoke (90 s), parity (150 s) or speed (240 s)
  scripts/gpu_check.py speed --resume NAME/speed.json --out NAME    without what has passed there
  scripts/gpu_check.py parity --only modes --only "parity llama"    checks whose names begin so (`--list` prints them)
  scripts/gpu_check.py --device cpu --small                         the same code at toy size, where there is no GPU

Writes NAME/STAGE.json after each check, and NAME.md, a page of all stages in the folder NAME. Exit code 0: everything
ran and is within its limit; so `gpu_check.py smoke && gpu_check.py parity && gpu_check.py speed` stops at what fails.
Limits of speed are shares of ceilings that are measured in the same run. What does not fit into a stage's time is
reported as not run. How to run it on a GPU machine without network: docs/gpu.md.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported
sys.path.insert(0, str(ROOT))  # before a miniserve that is installed

from scripts.gpu import report  # noqa: E402
from scripts.gpu.checks import STAGES, Kind, Stage  # noqa: E402
from scripts.gpu.report import FINE, Result, Verdict  # noqa: E402
from scripts.gpu.stages import Run  # noqa: E402

TOTAL = 420.0
"""Seconds for all stages. What one does not need is left to the next, up to its own limit."""


def main() -> int:
    """Run the stages; 0 if all checks ran and all are within their limits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", nargs="?", choices=[stage.name for stage in STAGES], help="one stage; default: all")
    parser.add_argument(
        "--out", type=Path, default=Path("gpu_check"), help="writes OUT.md and OUT/; default: %(default)s"
    )
    parser.add_argument(
        "--resume", type=Path, action="append", default=[], metavar="FILE", help="STAGE.json of an earlier run"
    )
    parser.add_argument("--device", default="cuda", help="cuda or cpu; default: %(default)s")
    parser.add_argument("--small", action="store_true", help="toy sizes; limits of speed are not judged")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="checks whose names begin so")
    parser.add_argument("--list", action="store_true", help="print the names of the checks")
    args = parser.parse_args()
    stages = list(chosen(args.stage, args.only))
    if args.list or not stages:
        print("\n".join(f"{stage.name:<8} {check.name}" for stage in stages or STAGES for check in stage.checks))
        return 0 if args.list else 2
    earlier: dict[str, Result] = {}
    for file in args.resume:
        try:
            earlier |= report.passed_before(file, args.device, args.small)
        except (OSError, ValueError, KeyError) as error:
            parser.error(f"--resume {file}: {error}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    end = time.monotonic() + TOTAL
    about = report.facts(args.device, args.small)
    runs = [OneStage(stage, args, about, earlier) for stage in stages]  # all are in the report from the start
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        for stage in runs:
            stage.run(end - time.monotonic() if args.stage is None else stage.stage.seconds, Path(folder))
    verdicts = [stage.verdict for stage in runs]
    print(f"{', '.join(verdicts)}: {report.page_of(args.out)}")
    return 0 if all(verdict in FINE for verdict in verdicts) else 1


def chosen(name: str | None, only: list[str]) -> Iterable[Stage]:
    """The stages of that name, or all, with the checks whose names begin with one of `only`."""
    for stage in STAGES:
        checks = [c for c in stage.checks if not only or any(c.name.startswith(begin) for begin in only)]
        if checks and name in (None, stage.name):
            yield replace(stage, checks=checks)


class OneStage:
    """A stage with its report, which is written after each check."""

    def __init__(self, stage: Stage, args: Namespace, about: dict[str, Any], earlier: dict[str, Result]) -> None:
        self.stage, self._out, self._about = stage, args.out, about
        self._run = Run(stage, args.device, args.small, earlier, self._changed)
        self._begun, self._seconds = time.monotonic(), stage.seconds
        self._write()

    @property
    def verdict(self) -> Verdict:
        """Of all its checks."""
        return report.verdict(self._run.results)

    def run(self, left: float, folder: Path) -> None:
        """Run it, if so many seconds are left of all."""
        self._begun, self._seconds = time.monotonic(), max(min(self.stage.seconds, left), 0)
        print(f"--- {self.stage.name}: {len(self.stage.checks)} checks, {self._seconds:.0f} s at most", flush=True)
        try:
            self._run.run(self._seconds, folder)
        finally:
            self._write()
        for result in self._run.results:
            if result.verdict is Verdict.NOT_RUN or result.note.startswith(report.BEFORE):
                show(result)

    def _changed(self, result: Result) -> None:
        show(result)
        self._write()

    def _write(self) -> None:
        spent = {"seconds": round(time.monotonic() - self._begun, 1), "limit": round(self._seconds, 1)}
        report.write(self._out, self.stage.name, self._about | spent, self._run.results)


def show(result: Result) -> None:
    """Lines of a check as it ends: its figures of speed, and what is wrong."""
    print(f"{result.verdict:<10} {result.seconds:6.1f} s  {result.check}  {result.note}".rstrip(), flush=True)
    for figure in result.figures:
        wrong = not figure.ok and result.verdict is not Verdict.NOT_JUDGED
        if result.kind is Kind.SPEED or wrong:
            limit = f"  <-- not {figure.rule} {report.shown(figure.limit)}" if wrong else ""
            print(f"    {figure.name}: {report.shown(figure.value)} {figure.unit}{limit}", flush=True)
    if result.verdict is Verdict.FAILED:
        print(f"    look first at {result.look}", flush=True)
    if result.error:
        print(result.error, flush=True)


if __name__ == "__main__":
    sys.exit(main())
