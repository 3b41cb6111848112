"""Tables and figures of a comparison: known answers, what is not measured, and the same bytes for the same cells."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from rich.console import Console

from scripts.figures import tables
from scripts.figures.tables import SHOWN, Cell, goodput, markdown, measured, print_tables

FIGURES = "latency", "violations", "energy", "throughput"


@pytest.fixture
def plots() -> ModuleType:
    pytest.importorskip("matplotlib")
    from scripts.figures import plots

    return plots


@pytest.fixture
def timeline_plot() -> ModuleType:
    pytest.importorskip("matplotlib")
    from scripts.figures import timeline_plot

    return timeline_plot


def cell(policy: str = "observe", rate: float = 1.0, **over: Any) -> Cell:
    """One with easy numbers; `broken` is all its shares of violations."""
    broken = over.pop("broken", 0.0)
    ratio = over.pop("ratio", 2.0)
    made: Cell = {
        "policy": policy,
        "topology": "1P3D",
        "label": f"{policy} 1P3D",
        "rate": rate,
        "seed": 0,
        "mispredict": 0.1,
        "slo_violation": dict.fromkeys(("ttfet", "last_turn_tbt", "e2e"), broken),
        "throughput": {"conversations_per_s": 0.5, "output_tokens_per_s": 300.0},
        "energy": {"joules": 10.0, "tokens_per_joule": 62.0},
        "errors": 0,
    }
    norm = {"gmean": ratio, "p50": ratio, "p95": 2 * ratio}
    return made | {f"{name}_norm": dict(norm) for name in ("ttfet", "last_turn_tbt", "e2e")} | over


def comparison() -> list[Cell]:
    """All policies, three rates, two seeds, and a sweep over wrong predictions."""
    cells = [
        cell(policy, rate, seed=seed, ratio=1 + rate * (n + 1) + seed / 10, broken=0.02 * n * seed)
        for n, policy in enumerate(SHOWN)
        for rate in (0.5, 1.0, 1.634)
        for seed in (0, 1)
    ]
    return cells + [cell("ampd", 1.634, mispredict=share, ratio=2 + 9 * share) for share in (0.0, 0.3)]


def timeline() -> dict[str, Any]:
    steps = [[n / 10, n / 10 + 0.08, "mixed" if n % 7 == 0 else "decode"] for n in range(1000)]
    kv = [(0.0, 0, 0), (50.0, 500, 100), (100.0, 400, 600)]
    return {
        "policy": "observe",
        "topology": "1P2D",
        "rate": 1.0,
        "window": [0.0, 100.0],
        "spans": {"p0": [[1.0, 2.0, "prefill"], [1.5, 2.5, "transfer"]], "d9": steps[::2], "d10": steps},
        "kv": dict.fromkeys(("p0", "d9", "d10"), kv),
        "pages": dict.fromkeys(("p0", "d9", "d10"), 1000),
    }


def test_a_figure_is_averaged_over_those_that_measured_it() -> None:
    cells = [cell(ratio=1.0), cell(ratio=4.0, seed=1), cell(seed=2, ttfet_norm=None)]
    assert measured(cells, "ttfet_norm", "gmean") == (2.5, 1.0, 4.0)
    assert measured(cells[2:], "ttfet_norm", "gmean") is None
    assert measured([cell(ratio=float("nan"))], "ttfet_norm", "gmean") is None
    assert measured(cells, "nothing", "like", "it") is None


def test_goodput_is_the_highest_rate_tested_that_keeps_all_slos() -> None:
    cells = [cell(rate=0.5), cell(rate=1.0, broken=0.0099), cell(rate=1.5, broken=0.01), cell("ampd", 0.5, broken=0.2)]
    assert goodput(cells, "observe 1P3D") == 1.0
    assert goodput(cells, "ampd 1P3D") is None
    assert goodput(cells, "unknown") is None


def test_goodput_needs_every_slo_and_is_of_the_mean_over_seeds() -> None:
    one_broken = cell(rate=1.5, slo_violation={"ttfet": 0.0, "last_turn_tbt": 0.3, "e2e": 0.0})
    not_measured = cell(rate=2.0, slo_violation={"ttfet": 0.0, "last_turn_tbt": None, "e2e": 0.0})
    assert goodput([cell(rate=0.5), one_broken, not_measured], "observe 1P3D") == 0.5
    seeds = [cell(rate=1.0, broken=0.015), cell(rate=1.0, seed=1, broken=0.001)]
    assert goodput(seeds, "observe 1P3D") == 1.0
    assert goodput(seeds[:1], "observe 1P3D") is None


def test_markdown_has_a_table_for_each_rate_and_one_of_goodput() -> None:
    colocated = cell("colocated", 1.0, ratio=2.95, broken=0.175, errors=3, label="a|b", energy=None)
    text = markdown(
        [cell(rate=1.634, ratio=10.5), cell(rate=1.0), cell(rate=1.0, seed=1, ratio=2.5, errors=1), colocated]
    )
    lines = text.splitlines()
    assert [line for line in lines if line.startswith("**")] == [
        "**At 1 conversations/s, times standalone (means of 2 seeds)**",
        "**At 1.634 conversations/s, times standalone**",
        "**Goodput: the highest rate tested with < 1 % violations of each SLO**",
    ]
    assert r"| a\|b | 2.95 / 5.90 | 2.95 / 5.90 | 2.95 / 5.90 | 17.5 / 17.5 / 17.5 | 300 | - | 3 |" in lines
    assert "| observe 1P3D | 2.25 / 4.50 | 2.25 / 4.50 | 2.25 / 4.50 | 0 / 0 / 0 | 300 | 62.0 | 1 |" in lines
    assert "| observe 1P3D | 10.5 / 21.0 | 10.5 / 21.0 | 10.5 / 21.0 | 0 / 0 / 0 | 300 | 62.0 | 0 |" in lines
    assert lines[-2:] == [r"| a\|b | - |", "| observe 1P3D | 1.634 |"]
    assert lines.index(r"| a\|b | - |") > lines.index("| Policy | conversations/s |")
    widths = {line.replace(r"\|", "").count("|") for line in lines if line.startswith("|")}
    assert widths == {9, 3}
    assert markdown([]) == ""


def test_a_sweep_of_wrong_predictions_is_told_apart_in_tables_and_left_out_of_goodput() -> None:
    cells = [cell("ampd", 1.0), cell("ampd", 0.5), cell("ampd", 1.0, mispredict=0.3, broken=0.5), cell(mispredict=0.3)]
    rows = [line.split(" | ")[0] for line in markdown(cells).splitlines() if line.startswith(("| ampd", "| obs"))]
    ten, thirty, other = "| ampd 1P3D, 10 % wrong", "| ampd 1P3D, 30 % wrong", "| observe 1P3D"
    assert rows == [ten, ten, thirty, other, ten, other]
    assert goodput(cells, "ampd 1P3D") == 1.0
    assert goodput(cells, "ampd 1P3D, 30 % wrong") is None


@pytest.mark.parametrize("width", [80, 120])
def test_tables_fit_a_terminal_and_leave_out_what_was_not_measured(width: int) -> None:
    def shown(cells: list[Cell]) -> str:
        console = Console(file=io.StringIO(), width=width)
        print_tables(cells, console)
        return console.file.getvalue()  # type: ignore[attr-defined]

    text = shown([cell("disaggregated", broken=0.98, ratio=19, label="[red] disaggregated 1P3D"), cell(ratio=2.55)])
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    for part in ("[red]", "disaggregated", "19.0/38.0", "98.0/98.0/98.0", "2.55/5.10", "tok/J", "Errors"):
        assert part in text
    without = shown([cell(energy={"joules": None, "tokens_per_joule": None})])
    assert "tok/J" not in without
    assert "tok/s" in without


def test_figures_are_written_in_both_formats_and_the_same_cells_give_the_same_bytes(
    plots: ModuleType, tmp_path: Path
) -> None:
    first, second = (plots.draw(comparison(), tmp_path / name / "new") for name in "ab")
    assert {path.name for path in first} == {
        f"{stem}.{kind}" for stem in (*FIGURES, "mispredict") for kind in ("png", "svg")
    }
    for one, other in zip(first, second, strict=True):
        data = one.read_bytes()
        assert data == other.read_bytes(), one.name
        assert data.startswith(b"\x89PNG" if one.suffix == ".png" else b"<?xml")
        assert len(data) > 20_000


def test_what_is_not_measured_is_not_drawn(plots: ModuleType, tmp_path: Path) -> None:
    nulls = {f"{name}_norm": None for name in ("ttfet", "last_turn_tbt", "e2e")}
    bare = cell(rate=1.0, energy=None, slo_violation=None, mispredict=None, **nulls)
    assert [path.name for path in plots.draw([bare], tmp_path)] == ["throughput.png", "throughput.svg"]
    gaps = [
        cell(rate=0.5),
        bare,
        cell("conserve", 1.0),
        cell("ampd", 1.0, mispredict=None),
        cell("vllm", 1.0, e2e_norm=None),
    ]
    assert {path.stem for path in plots.draw(gaps, tmp_path)} == set(FIGURES)
    assert plots.draw([], tmp_path) == []


def test_a_single_point_is_drawn(plots: ModuleType, tmp_path: Path) -> None:
    assert {path.stem for path in plots.draw([cell(), cell(seed=1, ratio=30.0)], tmp_path)} == set(FIGURES)


def test_points_are_means_and_bands_reach_to_the_extremes(plots: ModuleType) -> None:
    cells = [cell(rate=rate, seed=seed, ratio=rate * (1 + seed)) for rate in (1.0, 2.0) for seed in (0, 2)]
    with plots.drawing():
        axes = plots.against(plots.SHEETS["latency"], "rate", cells).axes[0]
    mean, slo = axes.get_lines()[:2]
    assert list(zip(*mean.get_data(), strict=True)) == [(1.0, 2.0), (2.0, 4.0)]
    assert list(slo.get_ydata()) == [5.0, 5.0]
    (band,) = axes.collections
    assert {tuple(point) for point in band.get_paths()[0].vertices} >= {(1.0, 1.0), (1.0, 3.0), (2.0, 2.0), (2.0, 6.0)}


def test_wrong_predictions_are_drawn_against_their_share(plots: ModuleType) -> None:
    with plots.drawing():
        axes = plots.wrong_predictions(comparison()).axes[0]
        assert plots.wrong_predictions([cell(), cell("ampd")]) is None
    xs = [list(line.get_xdata()) for line in axes.get_lines() if line.get_marker() not in ("", "None")]
    assert xs == [[0.0, 10.0, 30.0]]
    assert len(axes.get_lines()) == 1 + (len(SHOWN) - 1) + 1  # the policy, those that predict nothing, the SLO


def test_a_policy_looks_the_same_whatever_else_is_shown_and_like_no_other(plots: ModuleType) -> None:
    series = {policy: [cell(policy)] for policy in (*SHOWN, "another")}
    found = plots.looks(series)
    for trait in ("color", "marker", "dashes"):
        assert len({str(look[trait]) for look in found.values()}) == len(series), trait
    for policy in SHOWN:
        assert plots.looks({policy: [cell(policy)]})[policy] == found[policy]
    twice = plots.looks({"conserve 1P3D": [cell("conserve")], "conserve 2P2D": [cell("conserve")]})
    assert twice["conserve 1P3D"]["color"] == twice["conserve 2P2D"]["color"]
    assert twice["conserve 1P3D"]["dashes"] != twice["conserve 2P2D"]["dashes"]


def test_a_users_own_settings_do_not_matter_and_are_kept(plots: ModuleType, tmp_path: Path) -> None:
    import matplotlib

    cells = [cell(rate=rate) | {"throughput": {}, "slo_violation": None, "energy": None} for rate in (1.0, 2.0)]
    before = plots.draw(cells, tmp_path / "a")
    with matplotlib.rc_context({"font.size": 30, "axes.facecolor": "black", "svg.hashsalt": "x"}):
        after = plots.draw(cells, tmp_path / "b")
        assert matplotlib.rcParams["font.size"] == 30
    assert [path.read_bytes() for path in before] == [path.read_bytes() for path in after]


def test_a_timeline_has_a_lane_for_each_worker(timeline_plot: ModuleType, tmp_path: Path) -> None:
    made: list[Any] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timeline_plot, "save", lambda figure, folder, name: made.append(figure) or [])
        timeline_plot.draw_timeline(timeline(), tmp_path, "t")
    lanes, fill = made[0].axes
    assert [label.get_text() for label in lanes.get_yticklabels()] == ["p0", "d9", "d10"]
    assert [text.get_text() for text in lanes.texts] == ["busy 1 %", "busy 40 %", "busy 80 %"]  # transfers do not count
    both, held = fill.get_lines()[:2]
    assert list(held.get_ydata()) == [0.0, 50.0, 40.0]
    assert list(both.get_ydata()) == [0.0, 60.0, 100.0]


def test_timelines_of_nothing_and_of_very_much(timeline_plot: ModuleType, tmp_path: Path) -> None:
    empty = timeline() | {"spans": {"p0": []}, "kv": {"p0": []}, "pages": {"p0": 0}}
    for path in timeline_plot.draw_timeline(empty, tmp_path, "empty"):
        assert path.stat().st_size > 5_000
    long = copy.deepcopy(timeline())
    long["spans"]["d9"] = [[n / 500, n / 500 + 0.001, ("decode", "mixed")[n % 2]] for n in range(50_000)]
    png, svg = timeline_plot.draw_timeline(long, tmp_path, "long")
    again = timeline_plot.draw_timeline(long, tmp_path / "again", "long")
    assert [png.read_bytes(), svg.read_bytes()] == [path.read_bytes() for path in again]
    assert png.stat().st_size > 20_000
    assert svg.stat().st_size < 500_000
    assert b"<image" in svg.read_bytes()  # bars are pixels there too


def test_without_matplotlib_a_message_says_what_to_install_and_tables_work() -> None:
    code = """
import sys
sys.modules["matplotlib"] = None
import scripts.figures.tables
from miniserve.config import ConfigError
for name in ("plots", "timeline_plot"):
    try:
        __import__(f"scripts.figures.{name}")
    except ConfigError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.count("pip install 'miniserve[bench]'") == 2
    assert "matplotlib" not in vars(tables)
