"""The cells of a comparison as figures, of which `figures.toml` has what is shown, and `looks.toml` how.

Needs matplotlib, which is in the extra `bench`. Not by pyplot, which keeps its figures in a global.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

import msgspec

from miniserve.bench.replay.metrics import SLO
from miniserve.config import ConfigError
from scripts.figures import tables
from scripts.figures.tables import Cell, Spread, by_rate, by_series, measured

try:
    from matplotlib import style
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FixedLocator, LogLocator, NullLocator
except ModuleNotFoundError as error:
    raise ConfigError("Figures are drawn with matplotlib: pip install 'miniserve[bench]'") from error

DPI = 150
INK, FAINT, PALE = "#222222", "#d9d9d9", "#f2f2f2"
FRONT = 3
"""The z-order of lines, above the grid, bands and limits."""
MORE_DASHES = [2, 1], [6, 1, 1, 1, 1, 1], [1, 2]
LEGEND_INCHES = 2.2
"""About the width of a name in the legend."""
LOG_FROM = 10.0
"""From this ratio of the highest to the lowest on, ratios are drawn on a logarithmic axis."""
SHARES = 0.0, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0
"""Ticks of a "symlog" axis, in %."""
LIMITS = {"SLO": SLO, f"{100 * tables.GOOD:g} %": 100 * tables.GOOD}


class Panel(msgspec.Struct, frozen=True):
    """One set of axes: the figure at `path`."""

    path: tuple[str, ...]
    title: str = ""
    unit: str = ""


class Sheet(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A figure, as `figures.toml` says it."""

    title: str
    x: str
    size: tuple[float, float]
    panels: list[Panel]
    columns: int = 1
    factor: float = 1.0
    scale: Literal["linear", "symlog", "ratio"] = "linear"
    limit: str = ""


Look = Mapping[str, Any]
HERE = Path(__file__).parent
LOOKS = msgspec.toml.decode((HERE / "looks.toml").read_bytes(), type=dict[str, dict[str, Any]])
SHEETS = msgspec.toml.decode((HERE / "figures.toml").read_bytes(), type=dict[str, Sheet])


def draw(cells: Sequence[Cell], folder: Path) -> list[Path]:
    """Write all figures that the cells have values for into `folder`; the files."""
    plain, paths = tables.usual(cells), []
    with drawing():
        for stem, one in SHEETS.items():
            figure = wrong_predictions(cells) if stem == "mispredict" else against(one, "rate", plain)
            paths += save(figure, folder, stem) if figure else []
    return paths


def against(one: Sheet, key: str, cells: Sequence[Cell]) -> Figure | None:
    """Panels of lines against the value of `key`, a line for each series; None where there is nothing to draw."""
    series = by_series(cells)
    styles = {
        name: look for name, look in looks(series).items() if any(measured(series[name], *p.path) for p in one.panels)
    }
    if not styles:
        return None
    figure, places = sheet(one.title, *one.size), sorted({cell[key] for cell in cells})
    log = one.scale == "ratio" and any(_wide(cells, panel.path) for panel in one.panels)
    for number, panel in enumerate(one.panels):
        axes = figure.add_subplot(-(-len(one.panels) // one.columns), one.columns, number + 1)
        axes.set_title(panel.title)
        axes.set_ylabel(panel.unit)
        axes.set_xlabel(one.x if number >= len(one.panels) - one.columns else "")
        for place, (name, look) in enumerate(styles.items(), 1):
            those = {at: [cell for cell in series[name] if cell[key] == at] for at in places}
            found = [(at, measured(mine, *panel.path)) for at, mine in those.items()]
            points = [(at, Spread(*(one.factor * value for value in spread))) for at, spread in found if spread]
            if len(places) == 1:  # no lines: points stand side by side
                points = [(at + place / (len(styles) + 1) - 0.5, spread) for at, spread in points]
                axes.set_xlim(places[0] - 0.5, places[0] + 0.5)
            line(axes, points, look)
        if not measured(cells, *panel.path):
            axes.text(0.5, 0.5, "not measured", transform=axes.transAxes, ha="center", va="center")
        ticks(axes.xaxis, places)
        _value_axis(axes, "log" if log else one.scale, one.limit)
    legend(figure, styles)
    return figure


def wrong_predictions(cells: Sequence[Cell]) -> Figure | None:
    """The policy that predicts against its share of wrong predictions, at the rate with the most shares. The others,
    for which the share does not matter, are level."""
    one = SHEETS["mispredict"]
    known = [cell for cell in cells if measured([cell], *one.panels[0].path)]
    found = by_rate([cell for cell in known if tables.predicts(cell)])
    shares = {rate: {cell["mispredict"] for cell in those} for rate, those in found.items()}
    rate = max(shares, key=lambda rate: (len(shares[rate]), rate), default=None)
    if rate is None or len(shares[rate]) < 2:
        return None
    # One series whatever its share, which is the place of a cell here.
    swept = [cell | {"wrong": 100 * cell["mispredict"], "mispredict": None} for cell in found[rate]]
    others = [cell for cell in known if cell["rate"] == rate and cell["policy"] != tables.PREDICTS]
    level = [cell | {"wrong": 100 * share, "level": True} for cell in others for share in shares[rate]]
    return against(msgspec.structs.replace(one, title=one.title.format(rate=rate)), "wrong", swept + level)


def _wide(cells: Sequence[Cell], path: tuple[str, ...]) -> bool:
    values = [found.mean for cell in cells if (found := measured([cell], *path)) and found.mean > 0]
    return bool(values) and max(values) >= LOG_FROM * min(values)


def _value_axis(axes: Axes, scale: str, limit: str) -> None:
    if limit:
        axes.axhline(LIMITS[limit], color=INK, linewidth=1, linestyle=(0, (2, 2)), zorder=FRONT - 1)
        note(axes, limit, LIMITS[limit], 4)
    if scale == "log":
        axes.set_yscale("log")
        ticks(axes.yaxis, None)
    elif scale == "symlog":
        axes.set_yscale("symlog", linthresh=1, linscale=0.5)
        axes.set_ylim(0, 130)
        ticks(axes.yaxis, SHARES)
    else:
        axes.set_ylim(bottom=0)


# --- what all figures share -----------------------------------------------------------------------------------------


def looks(series: Mapping[str, Sequence[Cell]]) -> dict[str, Look]:
    """How the line of each series is drawn, as matplotlib has it. A policy keeps its colour whatever else is shown; its
    second series has hollow markers. One that is `level` has none."""
    found: dict[str, Look] = {}
    for name, cells in series.items():
        policy = cells[0]["policy"]
        look = LOOKS.get(policy, LOOKS["other"])
        if before := sum(series[earlier][0]["policy"] == policy for earlier in found):
            hollow = {"markerfacecolor": "white", "markeredgecolor": look["color"]}
            look = look | hollow | {"dashes": MORE_DASHES[(before - 1) % len(MORE_DASHES)]}
        found[name] = look | {"marker": ""} if cells[0].get("level") else look
    return found


def drawing() -> AbstractContextManager[None]:
    """A context with this style; the user's own settings do not matter in it and are back after it."""
    return style.context(["default", HERE / "figures.mplstyle"])


def sheet(title: str, width: float, height: float) -> Figure:
    """An empty figure of a size in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(title)
    return figure


def save(figure: Figure, folder: Path, stem: str) -> list[Path]:
    """Write PNG and SVG: the same bytes for the same figure."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{stem}.png", folder / f"{stem}.svg"]
    figure.savefig(paths[0], dpi=DPI, metadata={"Software": None})
    figure.savefig(paths[1], dpi=DPI, metadata={"Date": None, "Creator": None})
    return paths


def line(axes: Axes, points: Sequence[tuple[float, Spread]], look: Look) -> None:
    """Draw means, and the range of seeds: a band, or a bar where there is only one point."""
    x = [at for at, _ in points]
    mean, low, high = ([spread[n] for _, spread in points] for n in range(3))
    axes.plot(x, mean, zorder=FRONT, **look)
    if len(points) > 1:
        axes.fill_between(x, low, high, color=look["color"], alpha=0.18, linewidth=0, zorder=FRONT - 1)
    else:
        axes.vlines(x, low, high, color=look["color"], linewidth=1.2, zorder=FRONT - 1)


def note(axes: Axes, text: str, at: float, gap: float) -> None:
    """Write `gap` points beside the right end of the axes, at a value of theirs."""
    place: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
    axes.annotate(text, (1, at), (gap, 0), **place, va="center", fontsize=9)


def legend(figure: Figure, styles: Mapping[str, Look]) -> None:
    """Put the legend below everything, in as many columns as fit."""
    lines = [Line2D([], [], label=name, **look) for name, look in styles.items()]
    columns = int(figure.get_figwidth() / LEGEND_INCHES)
    figure.legend(handles=lines, loc="outside lower center", ncols=columns, handlelength=3.6)


def ticks(axis: Any, places: Sequence[float] | None) -> None:
    """Set ticks at `places` only (None: at 1, 2 and 5 of each decade), with plain numbers."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)) if places is None else FixedLocator(places))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter("{x:g}")
