"""What all figures share: their style, lines, axes and files.

Needs matplotlib, which is in the extra `bench`. Not by pyplot, which keeps its figures in a global.
"""

import tomllib
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from miniserve.bench.figures.tables import Cell, Spread
from miniserve.config import ConfigError

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
LOOKS: dict[str, dict[str, Any]] = tomllib.loads(Path(__file__).with_name("looks.toml").read_text("utf-8"))
MORE_DASHES = [2, 1], [6, 1, 1, 1, 1, 1], [1, 2]
LEGEND_INCHES = 2.2
"""About the width of a name in the legend."""

Look = Mapping[str, Any]


def looks(series: Mapping[str, Sequence[Cell]]) -> dict[str, Look]:
    """How the line of each series is drawn, as matplotlib has it. A policy keeps its colour whatever else is shown; its
    second series has hollow markers."""
    found: dict[str, Look] = {}
    for name, cells in series.items():
        policy = cells[0]["policy"]
        look = LOOKS.get(policy, LOOKS["other"])
        if before := sum(series[earlier][0]["policy"] == policy for earlier in found):
            hollow = {"markerfacecolor": "white", "markeredgecolor": look["color"]}
            look = look | hollow | {"dashes": MORE_DASHES[(before - 1) % len(MORE_DASHES)]}
        found[name] = look
    return found


def drawing() -> AbstractContextManager[None]:
    """A context with this style; the user's own settings do not matter in it and are back after it."""
    return style.context(["default", Path(__file__).with_name("figures.mplstyle")])


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
