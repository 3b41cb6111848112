"""scripts/goodput.py: intervals, and a search whose end is known."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from scripts import goodput


def test_intervals_are_student_s() -> None:
    assert goodput.interval([1.0]) == (1.0, None)
    mean, half = goodput.interval([1.0, 2.0, 3.0])
    assert mean == 2.0
    assert half == pytest.approx(4.303 / 3**0.5)


def test_a_cell_is_good_below_one_percent_of_each_slo() -> None:
    good = {"slo_violation": {"ttfet": 0.009, "last_turn_tbt": 0.0, "e2e": None}, "errors": 0}
    assert goodput.is_good(good)
    assert not goodput.is_good(good | {"errors": 1})
    assert not goodput.is_good(good | {"slo_violation": {"ttfet": 0.0, "last_turn_tbt": 0.01, "e2e": 0.0}})


def test_the_search_ends_between_a_good_and_a_bad_rate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One worker, prompts of 8,000 tokens: a second for four of them, so that 20 a second are too many."""
    (tmp_path / "trace.csv").write_text(
        "conversation_id,turn,new_input_tokens,output_tokens\n" + "".join(f"c{n},0,8000,8\n" for n in range(60))
    )
    out = tmp_path / "found.json"
    what = f"{tmp_path / 'trace.csv'} --policies colocated@1D --low 0.5 --high 20 --within 1 --jobs 1 --json {out}"
    assert goodput.main(what.split()) == 0
    (found,) = json.loads(out.read_text())
    assert 0.5 <= found["good"] < found["bad"] <= 20
    assert found["bad"] - found["good"] <= 1
    by_rate = {cell["rate"]: goodput.is_good(cell) for cell in found["cells"]}
    assert by_rate[found["good"]]
    assert found["bad"] == 20 or not by_rate[found["bad"]]
    assert "colocated 1D" in capsys.readouterr().out
