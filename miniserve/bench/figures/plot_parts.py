"""What all figures share: their style, lines, axes and files.

Needs matplotlib, which is in the extra `bench`. Not by pyplot, which keeps its figures in a global.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

from miniserve.bench.figures.tables import Cell, Spread
from miniserve.config import ConfigError

try:
    from matplotlib import style
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
except ModuleNotFoundError as error:
    raise ConfigError("Figures are drawn with matplotlib: pip install 'miniserve[bench]'") from error

DPI = 150
INK, FAINT, PALE = "#222222", "#d9d9d9", "#f2f2f2"
FRONT = 3
"""The z-order of lines, above the grid, bands and limits."""

Dash = str | tuple[int, tuple[float, ...]]


class Look(NamedTuple):
    color: str
    marker: str
    dash: Dash
    width: float = 1.6
    hollow: bool = False


# Colours of Okabe and Ito, distinct for the colour-blind too; dashes and markers are distinct without any colour.
LOOKS = {
    "colocated": Look("#595959", "s", (0, (5, 2))),
    "disaggregated": Look("#cc79a7", "v", (0, (1, 1.3))),
    "ampd": Look("#e69f00", "^", (0, (5, 1.5, 1, 1.5))),
    "conserve": Look("#009e73", "D", (0, (9, 2))),
    "observe": Look("#0072b2", "o", "-", 2.6),
}
OTHER_LOOKS = Look("#d55e00", "X", (0, (3, 1))), Look("#56b4e9", "P", (0, (2, 1))), Look("#8c6d31", "*", (0, (1, 2)))
MORE_DASHES: tuple[Dash, ...] = (0, (2, 1)), (0, (6, 1, 1, 1, 1, 1)), (0, (1, 2))


def looks(series: Mapping[str, Sequence[Cell]]) -> dict[str, Look]:
    """One for each series. A policy keeps its colour whatever else is shown; its second series has hollow markers."""
    policies = {name: cells[0]["policy"] for name, cells in series.items()}
    others = sorted(set(policies.values()) - set(LOOKS))
    found: dict[str, Look] = {}
    for name, policy in policies.items():
        look = LOOKS.get(policy) or OTHER_LOOKS[others.index(policy) % len(OTHER_LOOKS)]
        before = sum(policies[earlier] == policy for earlier in found)
        dash = look.dash if before == 0 else MORE_DASHES[(before - 1) % len(MORE_DASHES)]
        found[name] = look._replace(dash=dash, hollow=before % 2 == 1)
    return found


def drawing() -> AbstractContextManager[None]:
    """A context with this style; the user's own settings do not matter in it and are back after it."""
    return style.context(["default", Path(__file__).with_name("figures.mplstyle")])


def sheet(title: str, width: float, height: float) -> Figure:
    """An empty figure of a size in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
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
    front = FRONT + (look.width > 2)
    axes.plot(x, mean, zorder=front, **_drawn(look))
    if low == high:
        return
    if len(points) > 1:
        axes.fill_between(x, low, high, color=look.color, alpha=0.18, linewidth=0, zorder=FRONT - 1)
    else:
        axes.vlines(x, low, high, color=look.color, linewidth=1.2, zorder=FRONT - 1)


def note(axes: Axes, text: str, at: float, gap: float) -> None:
    """Write `gap` points beside the right end of the axes, at a value of theirs."""
    place: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
    axes.annotate(text, (1, at), (gap, 0), **place, va="center", fontsize=9)


def legend(figure: Figure, styles: Mapping[str, Look]) -> None:
    """Put the legend below everything, in as many columns as fit."""
    lines = [Line2D([], [], label=name, **_drawn(look)) for name, look in styles.items()]
    wide = [0.9 + 0.08 * len(name) for name in styles]  # inches, about
    rows = 1
    while rows < len(wide) and sum(max(wide[n : n + rows]) for n in range(0, len(wide), rows)) > figure.get_figwidth():
        rows += 1
    columns = -(-len(wide) // rows)
    figure.legend(handles=lines, loc="outside lower center", ncols=columns, handlelength=3.6)


def ticks(axis: Any, places: Sequence[float], labels: Mapping[float, str] | None = None) -> None:
    """Set ticks at `places` only, with plain numbers or `labels`."""
    axis.set_major_locator(FixedLocator(places))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}" if labels is None else labels.get(value, "")))


def _drawn(look: Look) -> dict[str, Any]:
    return {
        "color": look.color,
        "linestyle": look.dash,
        "linewidth": look.width,
        "marker": look.marker,
        "markersize": 6 if look.width < 2 else 7,
        "markerfacecolor": "white" if look.hollow else look.color,
        "markeredgecolor": look.color if look.hollow else "white",
        "markeredgewidth": 1.2 if look.hollow else 0.6,
    }
