"""The stages of scripts/gpu_check.py: order, limits, crashes and hangs of checks, resuming, the report. The checks here
are small ones in real processes."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from scripts.gpu import report, stages
from scripts.gpu.checks import STAGES, Check, Kind, Stage
from scripts.gpu.process import Outcome
from scripts.gpu.report import Result, Verdict
from scripts.gpu.setting import Figure
from tests.support.fake_checks import check, stage

ROOT = Path(__file__).resolve().parents[2]
ABOUT = {"date": "2026-12-01", "machine": "none", "versions": "none", "commit": "abc", "seconds": 1.0, "limit": 90.0}
ABOUT |= {"device": "cpu", "small": True, "judged": True}


def run(made: Stage, folder: Path, earlier: dict[str, Result] | None = None) -> dict[str, Result]:
    """Every result by its name."""
    results = stages.Run(made, "cpu", False, earlier or {}, lambda result: None).run(made.seconds, folder)
    assert [result.check for result in results] == [c.name for c in made.checks]
    return {result.check: result for result in results}


def alive(pid: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, 0)
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    return False


def test_checks_run_in_order_and_in_one_process(tmp_path: Path) -> None:
    seen: list[str] = []
    made = stage(check("fine 1"), check("broken"), check("wrong"), check("fine 2"))
    results = stages.Run(made, "cpu", False, {}, lambda result: seen.append(result.check)).run(60, tmp_path)
    assert seen == ["fine 1", "broken", "wrong", "fine 2"]
    assert [r.verdict for r in results] == [Verdict.PASSED, Verdict.FAILED, Verdict.FAILED, Verdict.PASSED]
    assert results[0].figures[0] == results[3].figures[0], "an error in Python leaves the process as it is"
    assert "RuntimeError: it broke" in results[1].error
    assert results[1].figures == [Figure("before", 1)]


def test_a_crash_and_a_hang_take_no_other_check_with_them(tmp_path: Path) -> None:
    made = stage(check("crash"), check("fine 1"), check("hang", seconds=1.0), check("fine 2"), check("absent"))
    found = run(made, tmp_path)
    assert [r.verdict is Verdict.PASSED for r in found.values()] == [False, True, False, True, False]
    crash, hang = found["crash"], found["hang"]
    assert "exit code -6" in crash.error
    assert "last words" in crash.error
    assert crash.figures == [Figure("before", 1)], "what it had found is known"
    assert "not done after 1 s" in hang.error
    assert re.search(r"fake_checks.py\", line \d+ in hang", hang.error), "where it was"
    child = int(hang.figures[0].value)
    deadline = time.monotonic() + 5
    while alive(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(child), "its children are ended too"


def test_an_unusable_device_ends_its_process(tmp_path: Path) -> None:
    found = run(stage(check("unusable"), check("fine")), tmp_path)
    assert "The device is unusable" in found["unusable"].error
    assert found["fine"].verdict is Verdict.PASSED
    assert found["fine"].figures[0].value != found["unusable"].figures[0].value


def test_a_slow_start_is_no_timeout(tmp_path: Path) -> None:
    found = run(stage(check("fine", seconds=1.0), prepare="slowly"), tmp_path)["fine"]
    assert found.verdict is Verdict.PASSED
    assert found.seconds < 1
    assert re.search(r"after [1-9]\d*\.\d s in which its process started", found.note)


def test_a_process_that_cannot_start_is_not_started_forever(tmp_path: Path) -> None:
    found = list(run(stage(*(check(f"fine {i}") for i in range(4)), prepare="never"), tmp_path).values())
    assert [r.verdict for r in found] == [Verdict.FAILED] * 2 + [Verdict.NOT_RUN] * 2
    assert "its process did not start" in found[0].error
    assert "no such library" in found[0].error
    assert found[3].note == "no process starts any more"


def test_what_does_not_fit_into_a_stage_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "LEAST", 0.3)
    begun = time.monotonic()
    found = run(stage(check("fine 1"), check("hang"), check("fine 2"), seconds=2), tmp_path)
    assert time.monotonic() - begun < 15
    assert [r.verdict for r in found.values()] == [Verdict.PASSED, Verdict.NOT_RUN, Verdict.NOT_RUN]
    assert found["hang"].note.startswith("cut off after")
    assert found["hang"].figures[0].name == "child"
    assert found["fine 2"].note == "the 2 s of its stage were over"


def test_an_interrupt_leaves_a_report_and_no_process(tmp_path: Path) -> None:
    """As of a caller whose time is over: the check that runs has not failed, and its children end with it."""
    program = f"""
import signal, sys
from pathlib import Path
from scripts.gpu.stages import Run
from tests.support.fake_checks import check, stage
if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    run = Run(stage(check("hang 1"), check("hang 2"), processes=2), "cpu", False, {{}}, lambda result: None)
    try:
        run.run(60, Path({str(tmp_path)!r}))
    finally:
        print(*(f"{{r.verdict}}: {{r.note}}" for r in run.results), sep=chr(10))
"""
    (tmp_path / "program.py").write_text(program)
    command = [sys.executable, str(tmp_path / "program.py")]
    path = {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | path) as process:
        children = [tmp_path / f"smoke-{number}" / "child" for number in range(2)]
        deadline = time.monotonic() + 30
        while not all(child.exists() for child in children) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.terminate()
        said, _ = process.communicate(timeout=30)
    assert process.returncode == 143
    assert re.findall(r"^not run: cut off", said, re.M) == ["not run: cut off"] * 2
    assert not any(alive(int(child.read_text())) for child in children)


def test_checks_run_side_by_side(tmp_path: Path) -> None:
    made = stage(*(check(f"together {i}", others=2) for i in range(2)), processes=2)
    assert all(result.verdict is Verdict.PASSED for result in run(made, tmp_path).values())


def test_speed_is_judged_on_a_gpu_alone(tmp_path: Path) -> None:
    slow = stage(check("wrong", kind=Kind.SPEED), check("broken", kind=Kind.SPEED))
    assert [r.verdict for r in run(slow, tmp_path).values()] == [Verdict.NOT_JUDGED, Verdict.FAILED]
    on_gpu = stages.Run(slow, "cuda", False, {}, lambda result: None)
    found = Result.of(slow.checks[0])
    on_gpu._judge(slow.checks[0], found, Outcome([Figure("share", 0.1, "", ">=", 0.85)]))
    assert found.verdict is Verdict.FAILED


# --- resuming -------------------------------------------------------------------------------------------------------


def test_what_has_passed_is_not_run_again(tmp_path: Path) -> None:
    first = stage(check("fine"), check("wrong"))
    results = list(run(first, tmp_path).values())
    report.write(tmp_path / "out", "smoke", ABOUT, results)
    earlier = report.passed_before(tmp_path / "out" / "smoke.json", "cpu", True)
    assert list(earlier) == ["fine"]
    again = run(first, tmp_path, earlier=earlier)
    assert again["fine"].figures == results[0].figures, "its figures are taken over"
    assert again["fine"].note == "passed before, at commit abc, 2026-12-01"
    assert again["wrong"].seconds != results[1].seconds
    # A report that took something over can be taken over.
    report.write(tmp_path / "out", "smoke", ABOUT | {"commit": "def"}, list(again.values()))
    note = report.passed_before(tmp_path / "out" / "smoke.json", "cpu", True)["fine"].note
    assert note == "passed before, at commit abc, 2026-12-01"
    with pytest.raises(ValueError, match="of device cpu"):
        report.passed_before(tmp_path / "out" / "smoke.json", "cuda", False)


# --- the report -----------------------------------------------------------------------------------------------------


def result(of: Check, verdict: Verdict, *figures: Figure, **more: Any) -> Result:
    made = Result.of(of)
    made.verdict, made.figures = verdict, list(figures)
    for name, value in more.items():
        setattr(made, name, value)
    return made


def test_the_report(tmp_path: Path) -> None:
    out = tmp_path / "2026-12-01-gpu"
    infinite = Figure("error", float("inf"), "", "<=", 0.01)
    smoke = [
        result(check("fine"), Verdict.PASSED, Figure("errors", 0, "", "==", 0), Figure("speed", 12.345678, "ms")),
        result(check("wrong"), Verdict.FAILED, infinite, Figure("a | b", "x", "", "==", "y"), error="Traceback: here"),
    ]
    report.write(out, "smoke", ABOUT, smoke)
    report.write(out, "speed", ABOUT, [result(check("late"), Verdict.NOT_RUN, note="the time was over")])

    def no(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    data = json.loads((out / "smoke.json").read_text(), parse_constant=no)
    assert data["verdict"] == "failed"
    assert [c["verdict"] for c in data["checks"]] == ["passed", "failed"]
    assert data["checks"][1]["figures"][0] == {
        "name": "error", "value": "inf", "unit": "", "rule": "<=", "limit": 0.01, "ok": False,
    }  # fmt: skip
    assert [Result.read(c).verdict for c in data["checks"]] == [r.verdict for r in smoke]
    page = (tmp_path / "2026-12-01-gpu.md").read_text()
    assert page.startswith("# GPU check: 1 passed, 1 failed, 1 not run\n")
    assert "Not a GPU" not in page
    assert "(2026-12-01-gpu/)" in page
    assert "- machine: none\n- versions: none\n" in page
    assert page.index("## wrong failed") < page.index("## Smoke") < page.index("## Speed")
    assert "Look first at what wrong does.\n\n- error: inf , not <= 0.01\n- a | b: x , not == y\n" in page
    assert "| fine | speed | 12.35 ms |  |  |" in page
    assert "| fine | errors | 0 | == 0 | ok |" in page
    assert "| wrong | a \\| b | x | == y | **failed** |" in page
    assert "| late | not run | 0.0 | the time was over |" in page
    assert sorted(path.name for path in out.iterdir()) == ["smoke.json", "speed.json"], "nothing half written"


def test_figures_of_a_cpu_say_so(tmp_path: Path) -> None:
    judged = [result(check("slow"), Verdict.NOT_JUDGED, Figure("share", 0.1, "", ">=", 0.85))]
    report.write(tmp_path / "cpu", "speed", ABOUT | {"judged": False}, judged)
    page = (tmp_path / "cpu.md").read_text()
    assert "**Not a GPU" in page
    assert "| slow | share | 0.1 | >= 0.85 |  |" in page


# --- the command ----------------------------------------------------------------------------------------------------


def test_the_limits_of_stages() -> None:
    assert [(s.name, s.seconds) for s in STAGES] == [("smoke", 90), ("parity", 150), ("speed", 240)]
    names = [c.name for s in STAGES for c in s.checks]
    assert len(names) == len(set(names))
    assert all(c.seconds < s.seconds and c.look for s in STAGES for c in s.checks)


def test_the_command(tmp_path: Path) -> None:
    """Two stages in one call, then one of them again with nothing left to do; it imports no torch itself."""

    def gpu_check(*arguments: str) -> subprocess.CompletedProcess[str]:
        script = [sys.executable, "-X", "importtime", str(ROOT / "scripts" / "gpu_check.py"), *arguments]
        return subprocess.run(script, capture_output=True, text=True, cwd=tmp_path, timeout=150)

    toy = ["--device", "cpu", "--small", "--out", "out"]
    done = gpu_check(*toy, "--only", "versions", "--only", "kernels experts")
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.findall(r"^--- (\w+)", done.stdout, re.M) == ["smoke", "parity"]
    assert not re.search(r"\| +(torch|transformers|miniserve)\b", done.stderr)
    again = gpu_check("smoke", *toy, "--only", "versions", "--resume", "out/smoke.json")
    assert again.returncode == 0, again.stdout + again.stderr
    assert "passed before" in again.stdout
    page = (tmp_path / "out.md").read_text()
    assert "| kernels experts | passed |" in page
    assert "| versions | passed |" in page
    refused = gpu_check("smoke", "--resume", "out/smoke.json")
    assert refused.returncode == 2
    assert "of device cpu" in refused.stderr
