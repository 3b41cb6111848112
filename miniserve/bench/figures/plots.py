"""The cells of a comparison as figures. Needs matplotlib, which is in the extra `bench`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from miniserve.bench.figures import tables
from miniserve.bench.figures.plot_parts import FRONT, INK, drawing, legend, line, looks, note, save, sheet, ticks
from miniserve.bench.figures.tables import SLOS, Cell, Spread, by_rate, by_series, measured
from miniserve.bench.replay.metrics import SLO

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Keys = tuple[str, ...]

LOG_FROM = 10.0
"""From this ratio of the highest to the lowest on, ratios are drawn on a logarithmic axis."""
SHARES = 0.0, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0
"""Ticks of a "symlog" axis, in %."""
NAMES = {
    "ttfet": "First token of the last turn (TTFET)",
    "last_turn_tbt": "Gap between tokens, last turn (TBT)",
    "e2e": "Whole conversation (E2E)",
}


class Panel(NamedTuple):
    """One set of axes: the figure at `path`, times `factor`, against the rate. `limit` is a level to mark. `scale` is
    "linear", "log" or "symlog": logarithmic above 1, linear below."""

    title: str
    unit: str
    path: Keys
    factor: float = 1.0
    limit: tuple[float, str] | None = None
    scale: str = "linear"


def draw(cells: Sequence[Cell], folder: Path) -> list[Path]:
    """Write all figures that the cells have values for into `folder`; the files."""
    plain = tables.usual(cells)
    with drawing():
        figures = {
            "latency": _latency(plain),
            "violations": _violations(plain),
            "energy": _energy(plain),
            "mispredict": _mispredict(cells),
            "throughput": _throughput(plain),
        }
        return [path for stem, figure in figures.items() if figure is not None for path in save(figure, folder, stem)]


def _latency(cells: Sequence[Cell]) -> Figure | None:
    paths = [(f"{slo}_norm", q) for q in ("gmean", "p95") for slo in SLOS]
    scale = "log" if any(_wide(cells, path) for path in paths) else "linear"
    units = {"gmean": "geometric mean", "p95": "95th percentile"}
    panels = [
        Panel(title, f"{units[path[1]]}, × standalone", path, 1, (SLO, "SLO"), scale)
        for title, path in zip([*NAMES.values(), "", "", ""], paths, strict=True)
    ]
    return _against_rate("Latency, in times standalone (lower is better)", cells, panels, 3, (11, 6.6))


def _violations(cells: Sequence[Cell]) -> Figure | None:
    limit = 100 * tables.GOOD, f"{100 * tables.GOOD:g} %"
    panels = [Panel(NAMES[s], "conversations, %", ("slo_violation", s), 100, limit, "symlog") for s in SLOS]
    title = f"Conversations that missed their SLO of {SLO:g} times standalone (lower is better)"
    return _against_rate(title, cells, panels, 3, (11, 4.2))


def _energy(cells: Sequence[Cell]) -> Figure | None:
    panels = [Panel("", "output tokens per joule", ("energy", "tokens_per_joule"))]
    return _against_rate("Output tokens per joule (higher is better)", cells, panels, 1, (7, 4.6))


def _throughput(cells: Sequence[Cell]) -> Figure | None:
    panels = [
        Panel("Output tokens", "tokens/s", ("throughput", "output_tokens_per_s")),
        Panel("Completed conversations", "conversations/s", ("throughput", "conversations_per_s")),
    ]
    return _against_rate("Throughput (higher is better)", cells, panels, 2, (9, 4.2))


def _wide(cells: Sequence[Cell], path: Keys) -> bool:
    values = [found.mean for cell in cells if (found := measured([cell], *path)) and found.mean > 0]
    return bool(values) and max(values) >= LOG_FROM * min(values)


def _against_rate(
    title: str, cells: Sequence[Cell], panels: Sequence[Panel], columns: int, size: tuple[float, float]
) -> Figure | None:
    """Panels of lines, one for each series; None where there is nothing to draw."""
    series = by_series(cells)
    styles = {
        name: look for name, look in looks(series).items() if any(measured(series[name], *p.path) for p in panels)
    }
    if not styles:
        return None
    figure, rates = sheet(title, *size), list(by_rate(cells))
    for number, panel in enumerate(panels):
        axes = figure.add_subplot(-(-len(panels) // columns), columns, number + 1)
        axes.set_title(panel.title)
        # The panels of a row of three have the same unit, those of a column the same rates.
        axes.set_ylabel(panel.unit if columns < 3 or number % columns == 0 else "")
        axes.set_xlabel("arrivals, conversations/s" if number >= len(panels) - columns else "")
        values: list[float] = []
        for place, (name, look) in enumerate(styles.items(), 1):
            spreads = _points(series[name], "rate", panel.path)
            points = [(at, Spread(*(panel.factor * value for value in spread))) for at, spread in spreads]
            values += [value for _, spread in points for value in spread]
            if len(rates) == 1:  # no lines: points stand side by side
                points = [(at + place / (len(styles) + 1) - 0.5, spread) for at, spread in points]
                axes.set_xlim(rates[0] - 0.5, rates[0] + 0.5)
            line(axes, points, look)
        ticks(axes.xaxis, rates)
        _value_axis(axes, panel, values)
    legend(figure, styles)
    return figure


def _points(cells: Sequence[Cell], key: str, path: Keys) -> Iterator[tuple[float, Spread]]:
    """The figure at `path` for each value of `key`, where it was measured."""
    for at in sorted({cell[key] for cell in cells}):
        if spread := measured([cell for cell in cells if cell[key] == at], *path):
            yield at, spread


def _value_axis(axes: Axes, panel: Panel, values: Sequence[float]) -> None:
    if not values:
        axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", va="center")
    if panel.limit:
        limit, name = panel.limit
        axes.axhline(limit, color=INK, linewidth=1, linestyle=(0, (2, 2)), zorder=FRONT - 1)
        note(axes, name, limit, 4)
    if panel.scale == "log":
        axes.set_yscale("log")
        ticks(axes.yaxis, None)
    elif panel.scale == "symlog":
        axes.set_yscale("symlog", linthresh=1, linscale=0.5)
        axes.set_ylim(0, 130)
        ticks(axes.yaxis, SHARES)
    else:
        axes.set_ylim(bottom=0)


def _mispredict(cells: Sequence[Cell]) -> Figure | None:
    """The policy that predicts against its share of wrong predictions, at the rate with the most shares."""
    path = "ttfet_norm", "p95"
    found = [cell for cell in cells if tables.predicts(cell) and measured([cell], *path)]
    shares = {rate: {cell["mispredict"] for cell in those} for rate, those in by_rate(found).items()}
    rate = max(shares, key=lambda rate: (len(shares[rate]), rate), default=None)
    if rate is None or len(shares[rate]) < 2:
        return None
    here = [cell for cell in cells if cell["rate"] == rate and measured([cell], *path)]
    others = [cell for cell in here if cell["policy"] != tables.PREDICTS]
    swept = [cell for cell in here if tables.predicts(cell)]
    sweeps = {label: [cell for cell in swept if cell["label"] == label] for label in {c["label"]: 0 for c in swept}}
    series = by_series(others) | sweeps
    styles = looks(series)
    figure = sheet(f"Wrong predictions at {rate:g} conversations/s (lower is better)", 7.4, 4.8)
    axes = figure.add_subplot()
    values: list[float] = []
    for name, mine in series.items():
        if name in sweeps:
            points = [(100 * share, spread) for share, spread in _points(mine, "mispredict", path)]
            line(axes, points, styles[name])
            values += [value for _, spread in points for value in spread]
        elif level := measured(mine, *path):
            styles[name] = {**styles[name], "marker": ""}
            axes.axhline(level.mean, **styles[name])
            values.append(level.mean)
    ticks(axes.xaxis, sorted(100 * share for share in shares[rate]))
    axes.set_xlabel("predictions made wrong, %")
    axes.set_ylabel("TTFET, 95th percentile, × standalone")
    scale = "log" if max(values) >= LOG_FROM * min(values) else "linear"
    _value_axis(axes, Panel("", "", path, 1, (SLO, "SLO"), scale), values)
    legend(figure, styles)
    return figure
