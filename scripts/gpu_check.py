#!/usr/bin/env python3
"""Everything that only a GPU can show, in one command of under 8 minutes without network: correctness, speed, replay.

  scripts/gpu_check.py --out FOLDER                  all of it; exit code 0 = everything ran and is within its limit
  scripts/gpu_check.py --only kernels --only parity  checks whose names begin so (`--list` prints the names)
  scripts/gpu_check.py --device cpu --small          the same code at toy size, where there is no GPU

Writes gpu_check.json and gpu_check.md into FOLDER, after each check anew. Limits of speed are shares of
ceilings that are measured in the same run. A check that fails, hangs or crashes does not stop the others: they run in a
process of their own, which is started again. What did not run in time is reported as not run, which is a failure.

On a GPU machine without network: copy the wheels into the ignored folder `wheels/` of the checkout and run there

  python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --upgrade --target $HOME/site wheels/*.whl
  export PYTHONPATH="$HOME/site" FLASHINFER_CUDA_ARCH_LIST=9.0a FLASHINFER_DISABLE_JIT=1 FLASHINFER_WORKSPACE_BASE=$HOME
  python3 scripts/gpu_check.py --out "$OUT"

and the unit tests among them: python3 -m pytest -o addopts=-ra -m gpu tests/ops/test_gpu.py. See docs/gpu.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import platform
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import asdict
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported
sys.path.insert(0, str(ROOT))  # before a miniserve that is installed

import torch  # noqa: E402

from scripts.gpu.checks import CHECKS, Check  # noqa: E402
from scripts.gpu.common import Figure, Setting  # noqa: E402

BUDGET = 460.0
"""Seconds for everything: 8 minutes, less what the last check may take to end."""
GRACE = 10.0
"""A check that is near its end when its time is over may finish."""


# --- the process in which checks run --------------------------------------------------------------------------------


def worker(control: Connection, device: str, small: bool, folder: str) -> None:
    """Runs the checks it is sent, and sends each figure as it comes. Ends itself after an error that may have left
    the device unusable."""
    os.setsid()  # to end it with its children
    os.environ["MINISERVE_CACHE"] = str(Path(folder) / "cache")
    import transformers

    transformers.logging.disable_progress_bar()
    if device == "cpu":
        torch.set_num_threads(1)
    run = Setting(device, small, Path(folder))
    by_name = {check.name: check for check in CHECKS}
    while name := control.recv():
        error = ""
        try:
            for figure in by_name[name].function(run):
                control.send(figure)
        except Exception:
            error = traceback.format_exc()
        try:
            run.sync()
            run.release()
        except Exception as broken:
            control.send(f"{error}\nthe device is unusable: {broken}")
            return
        control.send(error)


class Process:
    """A worker process, started when it is needed."""

    def __init__(self, *arguments: Any) -> None:
        self._arguments = arguments
        self._process: Any = None
        self._control: Any = None

    def run(self, check: Check, seconds: float) -> tuple[list[Figure], str]:
        """The figures of a check, and what went wrong."""
        if self._process is None or not self._process.is_alive():
            context = multiprocessing.get_context("spawn")
            self._control, theirs = context.Pipe()
            self._process = context.Process(target=worker, args=(theirs, *self._arguments))
            self._process.start()
            theirs.close()
        figures: list[Figure] = []
        end = time.monotonic() + seconds
        try:
            self._control.send(check.name)
            while self._control.poll(max(end - time.monotonic(), 0)):
                heard = self._control.recv()
                if isinstance(heard, str):
                    return figures, heard
                figures.append(heard)
            error = f"not done after {seconds:.0f} s"
        except (EOFError, OSError):
            self._process.join(GRACE)
            error = f"its process ended with exit code {self._process.exitcode}"
        self.end()
        return figures, error

    def end(self) -> None:
        """End it and its children."""
        if self._process is not None:
            for how in (signal.SIGTERM, signal.SIGKILL):
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(self._process.pid, how)
                self._process.join(2)
            self._process = None


# --- the report -----------------------------------------------------------------------------------------------------


def verdict(check: Check, result: dict[str, Any], judged: bool) -> str:
    """`pass`, `FAIL`, `not run`, or `not judged` for speed where there is no GPU."""
    if "not_run" in result:
        return "not run"
    if result["error"]:
        return "FAIL"
    if check.group != "correctness" and not judged:
        return "not judged"
    return "pass" if all(figure.ok for figure in result["figures"]) else "FAIL"


def markdown(facts: dict[str, Any], results: dict[str, dict[str, Any]]) -> str:
    """Everything in one page."""
    lines = [f"# GPU check: {facts['verdict']}", ""]
    if not facts["judged"]:
        lines += ["**Not a GPU: figures mean nothing.** Limits of speed are not judged.", ""]
    lines += [f"- {name}: {facts[name]}" for name in ("machine", "versions", "commit", "seconds")]
    lines += ["", "| check | verdict | seconds |", "|---|---|---|"]
    lines += [f"| {name} | {r['verdict']} | {r.get('seconds', 0):.1f} |" for name, r in results.items()]
    for group in ("correctness", "speed", "replay"):
        lines += ["", f"## {group.capitalize()}", "", "| check | figure | value | limit | |", "|---|---|---|---|---|"]
        for name, r in results.items():
            if r["group"] == group:
                lines += [_row(name, figure, r["verdict"] != "not judged") for figure in r.get("figures", [])]
    for name, r in results.items():
        if r.get("error"):
            lines += ["", f"## {name} failed", "", "```", r["error"].strip()[-4000:], "```"]
    return "\n".join(lines) + "\n"


def _row(name: str, figure: Figure, judged: bool) -> str:
    value = figure.value if isinstance(figure.value, str) else f"{figure.value:.4g}"
    limit = figure.limit if isinstance(figure.limit, str) else f"{figure.limit:.4g}"
    said = "" if not figure.rule or not judged else "ok" if figure.ok else "**FAIL**"
    rule = f"{figure.rule} {limit}" if figure.rule else ""
    return f"| {name} | {figure.name} | {value} {figure.unit} | {rule} | {said} |"


def facts(device: str, small: bool) -> dict[str, Any]:
    """What ran where. Asks nvidia-smi, so that this process never holds a context on the device."""
    import subprocess

    def said(*command: str) -> str:
        try:
            return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return "unknown"

    import transformers

    gpu = "no GPU"
    if device != "cpu":
        gpu = said("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader")
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return {
        "machine": f"{gpu}, {os.cpu_count()} CPUs",
        "versions": ", ".join(f"{name} {v}" for name, v in versions.items()) + f", Python {platform.python_version()}",
        "commit": said("git", "rev-parse", "--short", "HEAD"),
        "device": device,
        "small": small,
        "judged": device != "cpu" and not small,
    }


def write(out: Path, about: dict[str, Any], results: dict[str, dict[str, Any]]) -> None:
    """The report so far."""
    out.mkdir(parents=True, exist_ok=True)
    checks = {
        name: r | {"figures": [asdict(f) | {"ok": f.ok} for f in r.get("figures", [])]} for name, r in results.items()
    }
    (out / "gpu_check.json").write_text(json.dumps(about | {"checks": checks}, indent=1) + "\n")
    (out / "gpu_check.md").write_text(markdown(about, results))


def main() -> int:
    """Run the checks; 0 if all ran and all are within their limits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu_check"), help="folder for gpu_check.json and .md")
    parser.add_argument("--device", default="cuda", help="cuda or cpu; default: %(default)s")
    parser.add_argument("--small", action="store_true", help="toy sizes; limits of speed are not judged")
    parser.add_argument("--only", action="append", default=[], metavar="NAME", help="checks whose names begin so")
    parser.add_argument("--budget", type=float, default=BUDGET, help="seconds for all; default: %(default)g")
    parser.add_argument("--list", action="store_true", help="print the names of the checks")
    args = parser.parse_args()
    chosen = [c for c in CHECKS if not args.only or any(c.name.startswith(name) for name in args.only)]
    if args.list or not chosen:
        print("\n".join(f"{check.group:<12} {check.name}" for check in CHECKS))
        return 0 if args.list else 2
    begun = time.monotonic()
    about = facts(args.device, args.small)
    results: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        process = Process(args.device, args.small, folder)
        try:
            for check in chosen:
                left = args.budget - (time.monotonic() - begun)
                result: dict[str, Any] = {"group": check.group, "error": ""}
                if left <= 0:
                    result["not_run"] = True
                else:
                    started = time.monotonic()
                    figures, result["error"] = process.run(check, min(check.seconds, left + GRACE))
                    result |= {"figures": figures, "seconds": time.monotonic() - started}
                result["verdict"] = verdict(check, result, about["judged"])
                results[check.name] = result
                print(f"{result['verdict']:<10} {result.get('seconds', 0):6.1f} s  {check.name}", flush=True)
                for figure in result.get("figures", []):
                    shown = figure.value if isinstance(figure.value, str) else f"{figure.value:.4g}"
                    fine = figure.ok or result["verdict"] == "not judged"
                    wrong = "" if fine else f"  <-- not {figure.rule} {figure.limit}"
                    if check.group != "correctness" or wrong:
                        print(f"    {figure.name}: {shown} {figure.unit}{wrong}", flush=True)
                if result["error"]:
                    print(result["error"], flush=True)
                about["seconds"] = round(time.monotonic() - begun, 1)
                fine = all(r["verdict"] in ("pass", "not judged") for r in results.values())
                about["verdict"] = "FAIL" if not fine else "pass" if len(results) == len(chosen) else "not finished"
                write(args.out, about, results)
        finally:
            process.end()
    print(f"{about['verdict']} after {about['seconds']:.0f} s: {args.out / 'gpu_check.md'}")
    return 0 if about["verdict"] == "pass" else 1


if __name__ == "__main__":
    sys.exit(main())
