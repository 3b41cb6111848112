"""What workers did at each moment of a run, as a figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scripts.figures.plots import FAINT, FRONT, PALE, drawing, note, save, sheet, ticks

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH = 11.0
KINDS = {"decode": "#8ecdf0", "mixed": "#009e73", "prefill": "#e69f00", "transfer": "#222222"}
"""Rarer ones are drawn above the others."""
KIND_NAMES = {"prefill": "prefill", "decode": "decode", "mixed": "both in one step", "transfer": "KV transfer"}
TALL, THIN = 0.56, 0.14
"""Heights in a lane: of what a worker computes, and below it of what it moves at the same time."""

Span = Sequence[Any]  # start, end, kind


def draw_timeline(timeline: Mapping[str, Any], folder: Path, name: str) -> list[Path]:
    """Draw a lane for each worker, coloured where it was busy, and below them how full its KV was (times in seconds);
    the files."""
    start, end = timeline["window"]
    lanes_height = 0.5 + 0.42 * max(len(timeline["spans"]), 1)
    with drawing():
        title = f"{timeline['policy']} on {timeline['topology']} at {timeline['rate']:g} conversations/s"
        figure = sheet(f"What workers did: {title}", WIDTH, lanes_height + 3.4)
        grid = figure.add_gridspec(2, 1, height_ratios=[lanes_height, 2.3])
        lanes = figure.add_subplot(grid[0])
        fill = figure.add_subplot(grid[1], sharex=lanes)
        lanes.set_xlim(start, max(end, start + 1e-9))
        _lanes(lanes, timeline["spans"], start, end)
        _fill(fill, timeline["kv"], timeline["pages"])
        return save(figure, folder, name)


def _lanes(axes: Axes, spans: Mapping[str, Sequence[Span]], start: float, end: float) -> None:
    """Draw bars, the first worker's on top, and at the right the share of the time that each computed."""
    from matplotlib.patches import Patch

    for lane, its in enumerate(spans.values()):
        mine = [(max(a, start), min(b, end), kind) for a, b, kind in its if b > start and a < end]
        axes.axhspan(lane - TALL / 2 - THIN / 2, lane + TALL / 2 + THIN / 2, color=PALE, linewidth=0, zorder=0)
        for kind, color in KINDS.items():
            bars = [(a, b - a) for a, b, k in mine if k == kind]
            place = (lane + TALL / 2 - THIN / 2, THIN) if kind == "transfer" else (lane - TALL / 2 - THIN / 2, TALL)
            # A vector for each of tens of thousands of bars would make an SVG of megabytes.
            axes.broken_barh(bars, place, facecolors=color, linewidth=0, zorder=FRONT, rasterized=True)
        busy = sum(b - a for a, b, kind in mine if kind != "transfer")
        note(axes, f"busy {100 * busy / (end - start):.0f} %" if end > start else "", lane, 6)
    axes.set_ylim(max(len(spans), 1) - 0.5, -0.5)
    axes.set_yticks(range(len(spans)), labels=list(spans))
    axes.tick_params(axis="y", length=0, labelsize=10)
    axes.tick_params(axis="x", labelbottom=False)
    axes.grid(False)
    handles = [Patch(facecolor=KINDS[kind], label=name) for kind, name in KIND_NAMES.items()]
    handles.append(Patch(facecolor=PALE, edgecolor=FAINT, label="idle"))
    axes.legend(handles=handles, loc="lower left", bbox_to_anchor=(0, 1), ncols=len(handles), borderaxespad=0.2)


def _fill(axes: Axes, kv: Mapping[str, Sequence[tuple[float, int, int]]], pages: Mapping[str, int]) -> None:
    """Draw shares of each pool: what conversations hold, and lighter, that and what is cached. Rows of `kv` are (time,
    held, cached pages)."""
    for number, (worker, rows) in enumerate(kv.items()):
        full = 100 / max(pages[worker], 1)
        times = [at for at, _, _ in rows]
        look: dict[str, Any] = {"color": f"C{number}", "drawstyle": "steps-post", "marker": ""}
        axes.plot(times, [full * (a + b) for _, a, b in rows], linewidth=1, alpha=0.4, zorder=FRONT - 1, **look)
        axes.plot(times, [full * held for _, held, _ in rows], zorder=FRONT, label=worker, **look)
    axes.set_ylim(0, 102)
    ticks(axes.yaxis, range(0, 101, 25))
    axes.set_ylabel("KV pool held, %\n(pale: with cached)")
    axes.set_xlabel("time, s")
    if kv:
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(kv), borderaxespad=0.2)
