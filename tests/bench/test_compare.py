"""scripts/compare.py: a grid of simulations, or of real servers."""

from __future__ import annotations

import json
from pathlib import Path

import psutil
import pytest

from miniserve.bench.replay.generators import WorkloadConfig
from miniserve.bench.replay.workload import Distribution
from miniserve.cli import main as cli
from scripts import compare

pytestmark = pytest.mark.slow


def test_a_comparison(tmp_path: Path, capsys):
    pytest.importorskip("matplotlib")
    command = "chat --conversations 6 --policies conserve,colocated@1D --topology 1P1D --rates 1,2 --seeds 1,2"
    assert compare.main([*command.split(), "--out", str(tmp_path), "--window", "0..60"]) == 0
    assert (tmp_path / "timeline-conserve-1P1D.svg").stat().st_size > 1000
    cells = json.loads((tmp_path / "cells.json").read_text())
    assert [(c["label"], c["rate"], c["seed"]) for c in cells] == [
        (label, rate, seed) for label in ("conserve 1P1D", "colocated 1D") for rate in (1, 2) for seed in (1, 2)
    ]
    assert cells[0]["command"].startswith(
        "miniserve simulate chat --rate 1 --seed 1 --scale-tokens 1 --arrivals poisson"
    )
    assert "conserve 1P1D" in (tmp_path / "tables.md").read_text()
    assert (tmp_path / "latency.png").stat().st_size > 10_000
    assert "conserve 1P1D" in capsys.readouterr().out
    again = cells[0]["command"].split()[1:]
    assert cli.main([*again, "--json", str(tmp_path / "again.json")]) == 0, "each cell can be repeated"
    repeated = json.loads((tmp_path / "again.json").read_text())
    assert repeated["ttfet_s"] == cells[0]["ttfet_s"]


@pytest.mark.long
def test_a_comparison_on_real_workers(tiny_folder: Path, tmp_path: Path, capsys):
    """Each cell has a server of its own, which is gone afterwards."""
    pytest.importorskip("aiohttp")
    trace = tmp_path / "t.csv"
    trace.write_text("conversation_id,turn,new_input_tokens,output_tokens\na,0,40,6\na,1,8,6\nb,0,30,5\n")
    command = f"{trace} --policies colocated,conserve --topology 1P1D --rates 5 --serve {tiny_folder}"
    assert compare.main([*command.split(), "--out", str(tmp_path)]) == 0
    cells = json.loads((tmp_path / "cells.json").read_text())
    assert [(c["label"], c["output_tokens"], c["errors"]) for c in cells] == [
        ("colocated 2D", 17, 0),
        ("conserve 1P1D", 17, 0),
    ]
    assert cells[1]["placements"] == {"p0->d0": 2, "d0": 1}
    assert str(tiny_folder) in cells[0]["server_command"]
    assert not [p for p in psutil.process_iter(["cmdline"]) if str(tiny_folder) in " ".join(p.info["cmdline"] or ())]
    assert compare.main([*command.split()[:-1], str(tmp_path / "nothing")]) == 1
    assert "did not start" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        ("--policies best", "'best' is not one of colocated"),
        ("--policies conserve@3X", "is not understood"),
        ("--out {nowhere}", "is not a folder"),
        ("--window 1..2", "use it with --out"),
        ("--hardware h100 --policies conserve", "No hardware profile"),
    ],
)
def test_a_comparison_that_cannot_be(tmp_path: Path, capsys, flags: str, complaint: str):
    flags = flags.replace("{nowhere}", str(tmp_path / "nowhere"))
    assert compare.main(["chat", "--conversations", "2", *flags.split()]) == 1
    assert complaint in capsys.readouterr().err


def test_flags_name_the_workload() -> None:
    config = WorkloadConfig(
        trace="chat",
        arrivals="burst",
        conversations=7,
        max_turns=2,
        scale_tokens=0.5,
        gap=Distribution.parse("0..3"),
        append=Distribution.parse("log:5..200"),
        same_prompt=True,
    )
    assert " ".join(compare.workload_flags(config, 1.5, 3)) == (
        "chat --rate 1.5 --seed 3 --max-turns 2 --gap 0..3 --append log:5..200 --same-prompt --scale-tokens 0.5 "
        "--arrivals burst --conversations 7"
    )
    plain = WorkloadConfig(trace="t.csv")
    named = " ".join(compare.workload_flags(plain, 2.0, 0))
    assert named == "t.csv --rate 2 --seed 0 --scale-tokens 1 --arrivals poisson"
