"""What was found, as JSON for each stage and as one page for all of them."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from importlib import metadata
from pathlib import Path
from typing import Any

from scripts.gpu.checks import STAGES, Check, Kind
from scripts.gpu.setting import Figure

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "triton", "flashinfer-python", "flashinfer-jit-cache", "apache-tvm-ffi", "transformers")
BEFORE = "passed before,"
SHOWN = 4000
"""Characters of an error that are shown."""


class Verdict(StrEnum):
    """What became of a check. Speed is not judged where there is no GPU."""

    PASSED = "passed"
    FAILED = "failed"
    NOT_RUN = "not run"
    NOT_JUDGED = "not judged"


FINE = (Verdict.PASSED, Verdict.NOT_JUDGED)


@dataclass
class Result:
    """Of one check. `note` says why it has not run, or that it was taken over from an earlier run."""

    check: str
    kind: Kind
    look: str
    verdict: Verdict = Verdict.NOT_RUN
    seconds: float = 0.0
    figures: list[Figure] = field(default_factory=list)
    error: str = ""
    note: str = ""

    @classmethod
    def of(cls, check: Check) -> Result:
        """Before it has run."""
        return cls(check.name, check.kind, check.look)

    @classmethod
    def read(cls, data: dict[str, Any]) -> Result:
        """From its JSON."""
        figures = [Figure(**{k: v for k, v in figure.items() if k != "ok"}) for figure in data["figures"]]
        return cls(**data | {"figures": figures, "kind": Kind(data["kind"]), "verdict": Verdict(data["verdict"])})

    def json(self) -> dict[str, Any]:
        """With what each figure must be, and whether it is."""
        return asdict(self) | {"figures": [_plain(figure) for figure in self.figures]}


def _plain(figure: Figure) -> dict[str, Any]:
    """JSON knows no infinity and nothing that is not a number."""
    finite = isinstance(figure.value, str) or math.isfinite(figure.value)
    return asdict(figure) | {"value": figure.value if finite else str(figure.value), "ok": figure.ok}


# --- where it ran ---------------------------------------------------------------------------------------------------


def facts(device: str, small: bool) -> dict[str, Any]:
    """What runs where. Asks nvidia-smi and what is installed: this process imports nothing large and never holds a
    context on the device."""
    gpu = "no GPU"
    if device != "cpu":
        gpu = _said("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader")
    versions = {"Python": platform.python_version()} | {package: installed(package) for package in PACKAGES}
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": f"{gpu}, {os.cpu_count()} CPUs, {platform.system()} {platform.machine()}",
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()),
        "commit": _said("git", "describe", "--always", "--dirty", "--exclude=*"),
        "device": device,
        "small": small,
        "judged": device != "cpu" and not small,
    }


def installed(package: str) -> str:
    """Its version. Nothing is imported."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _said(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown"


# --- files ----------------------------------------------------------------------------------------------------------


def verdict(results: list[Result]) -> Verdict:
    """Of a stage: what failed weighs most, then what has not run."""
    found = {result.verdict for result in results}
    return next(v for v in (Verdict.FAILED, Verdict.NOT_RUN, Verdict.PASSED, Verdict.NOT_JUDGED) if v in found)


def write(out: Path, stage: str, about: dict[str, Any], results: list[Result]) -> None:
    """The JSON of a stage into the folder `out`, and the page of all stages that lie there beside it. Each file is
    always whole, whenever this process is ended."""
    out.mkdir(parents=True, exist_ok=True)
    data = {"stage": stage, "verdict": verdict(results)} | about
    _replace(out / f"{stage}.json", json.dumps(data | {"checks": [r.json() for r in results]}, indent=1) + "\n")
    _replace(page_of(out), page(read_all(out), out.name))


def page_of(out: Path) -> Path:
    """As other results have them: NAME.md beside the folder NAME."""
    return out.parent / f"{out.name}.md"


def _replace(path: Path, text: str) -> None:
    new = path.with_suffix(".new")
    new.write_text(text, "utf-8")
    new.replace(path)


def read_all(out: Path) -> list[dict[str, Any]]:
    """Of all stages that have begun."""
    files = [out / f"{stage.name}.json" for stage in STAGES]
    return [json.loads(file.read_text("utf-8")) for file in files if file.exists()]


def passed_before(file: Path, device: str, small: bool) -> dict[str, Result]:
    """What passed by a stage's JSON, by the name of the check. Raises ValueError if it is of another kind of run."""
    data = json.loads(file.read_text("utf-8"))
    if (data["device"], data["small"]) != (device, small):
        raise ValueError(f"{file} is of device {data['device']}, small: {data['small']}")
    found = {}
    for check in data["checks"]:
        result = Result.read(check)
        if result.verdict is Verdict.PASSED:
            if not result.note.startswith(BEFORE):
                result.note = f"{BEFORE} at commit {data['commit']}, {data['date']}"
            found[result.check] = result
    return found


def page(stages: list[dict[str, Any]], folder: str) -> str:
    """Everything in one page: what failed comes first."""
    results = {stage["stage"]: [Result.read(check) for check in stage["checks"]] for stage in stages}
    every = [result for of in results.values() for result in of]
    counted = {v: sum(r.verdict == v for r in every) for v in Verdict}
    lines = [f"# GPU check: {', '.join(f'{n} {v}' for v, n in counted.items() if n)}", ""]
    if not all(stage["judged"] for stage in stages):
        lines += ["**Not a GPU, or toy sizes: figures of speed mean nothing, and their limits are not judged.**", ""]
    lines += ["| stage | verdict | seconds | of at most | commit | date |", "|---|---|---|---|---|---|"]
    for stage in stages:
        row = stage["stage"], stage["verdict"], f"{stage['seconds']:.0f}", f"{stage['limit']:.0f}"
        lines.append(_row(*row, stage["commit"], stage["date"]))
    lines.append("")
    for name in ("machine", "versions"):
        lines += [f"- {name}: {said}" for said in dict.fromkeys(stage[name] for stage in stages)]
    lines += ["", f"Raw figures: [{folder}/]({folder}/)."]
    for result in every:
        if result.verdict == Verdict.FAILED:
            lines += _failure(result)
    for name, of in results.items():
        lines += ["", f"## {name.capitalize()}", "", "| check | verdict | seconds | |", "|---|---|---|---|"]
        lines += [_row(r.check, r.verdict, f"{r.seconds:.1f}", r.note) for r in of]
        lines += ["", "| check | figure | value | limit | |", "|---|---|---|---|---|"]
        lines += [figure_row(r, figure) for r in of for figure in r.figures]
    return "\n".join(lines) + "\n"


def _failure(result: Result) -> list[str]:
    lines = ["", f"## {result.check} failed", "", f"Look first at {result.look}.", ""]
    for f in result.figures:
        if not f.ok:
            lines.append(f"- {f.name}: {shown(f.value)} {f.unit}, not {f.rule} {shown(f.limit)}")
    if result.error:
        lines += ["", "```", result.error.strip()[-SHOWN:], "```"]
    return lines


def figure_row(result: Result, figure: Figure) -> str:
    """A figure beside its limit."""
    judged = figure.rule and result.verdict != Verdict.NOT_JUDGED
    said = "" if not judged else "ok" if figure.ok else "**failed**"
    rule = f"{figure.rule} {shown(figure.limit)}" if figure.rule else ""
    return _row(result.check, figure.name, f"{shown(figure.value)} {figure.unit}".strip(), rule, said)


def shown(value: float | str) -> str:
    """Four digits are enough for a reader."""
    return value if isinstance(value, str) else f"{value:.4g}"


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
