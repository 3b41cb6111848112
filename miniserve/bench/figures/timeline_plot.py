"""What workers did at each moment of a run, as a figure."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from miniserve.bench.figures.plot_parts import DPI, FAINT, FRONT, PALE, drawing, note, save, sheet, ticks

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH = 11.0
KINDS = {"decode": "#8ecdf0", "mixed": "#009e73", "prefill": "#e69f00", "transfer": "#222222"}
"""Rarer ones are drawn above the others."""
KIND_NAMES = {"prefill": "prefill", "decode": "decode", "mixed": "both in one step", "transfer": "KV transfer"}
WORKERS = "#0072b2", "#d55e00", "#007a5a", "#b5548b", "#595959", "#a06f00", "#3b3b98", "#56b4e9"
DASHES = "-", (0, (5, 1.5)), (0, (1, 1)), (0, (5, 1, 1, 1))
TALL, THIN = 0.56, 0.14
"""Heights in a lane: of what a worker computes, and below it of what it moves at the same time."""

Span = Sequence[Any]  # start, end, kind


def draw_timeline(timeline: Mapping[str, Any], folder: Path, name: str) -> list[Path]:
    """Draw a lane for each worker, coloured where it was busy, and below them how full its KV was (times in seconds);
    the files."""
    workers = sorted({*timeline["spans"], *timeline["kv"]}, key=_place)
    start, end = timeline["window"]
    lanes_height = 0.5 + 0.42 * max(len(workers), 1)
    with drawing():
        title = f"{timeline['policy']} on {timeline['topology']} at {timeline['rate']:g} conversations/s"
        figure = sheet(f"What workers did: {title}", WIDTH, lanes_height + 3.4)
        grid = figure.add_gridspec(2, 1, height_ratios=[lanes_height, 2.3])
        lanes = figure.add_subplot(grid[0])
        fill = figure.add_subplot(grid[1], sharex=lanes)
        lanes.set_xlim(start, max(end, start + 1e-9))
        _lanes(lanes, timeline["spans"], workers, start, end)
        _fill(fill, timeline["kv"], workers)
        return save(figure, folder, name)


def _place(worker: str) -> tuple[bool, str, int]:
    """Prefillers first; d10 after d9."""
    role, number = re.fullmatch(r"(.*?)(\d*)", worker).groups()  # type: ignore[union-attr]  # this always matches
    return not worker.startswith("p"), role, int(number or 0)


def _lanes(axes: Axes, spans: Mapping[str, Sequence[Span]], workers: Sequence[str], start: float, end: float) -> None:
    """Draw bars, the first worker's on top, and at the right the share of the time that each computed."""
    from matplotlib.patches import Patch

    pixel = (end - start) / (WIDTH * DPI)
    for lane, worker in enumerate(workers):
        mine = sorted(
            (max(a, start), min(b, end), kind) for a, b, kind in spans.get(worker, ()) if b > start and a < end
        )
        axes.axhspan(lane - TALL / 2 - THIN / 2, lane + TALL / 2 + THIN / 2, color=PALE, linewidth=0, zorder=0)
        for kind, color in KINDS.items():
            bars = [(a, b - a) for a, b in joined(((a, b) for a, b, k in mine if k == kind), pixel / 2)]
            place = (lane + TALL / 2 - THIN / 2, THIN) if kind == "transfer" else (lane - TALL / 2 - THIN / 2, TALL)
            # A vector for each of tens of thousands of bars would make an SVG of megabytes.
            axes.broken_barh(bars, place, facecolors=color, linewidth=0, zorder=FRONT, rasterized=True)
        busy = sum(b - a for a, b in joined(((a, b) for a, b, kind in mine if kind != "transfer"), 0.0))
        note(axes, f"busy {100 * busy / (end - start):.0f} %" if end > start else "", lane, 6)
    axes.set_ylim(max(len(workers), 1) - 0.5, -0.5)
    ticks(axes.yaxis, range(len(workers)), dict(enumerate(workers)))
    axes.tick_params(axis="y", length=0, labelsize=10)
    axes.tick_params(axis="x", labelbottom=False)
    axes.grid(False)
    handles = [Patch(facecolor=KINDS[kind], label=name) for kind, name in KIND_NAMES.items()]
    handles.append(Patch(facecolor=PALE, edgecolor=FAINT, label="idle"))
    axes.legend(handles=handles, loc="lower left", bbox_to_anchor=(0, 1), ncols=len(handles), borderaxespad=0.2)


def joined(spans: Iterator[tuple[float, float]], gap: float) -> list[tuple[float, float]]:
    """Spans (start, end) in order of their starts, those joined that overlap or lie less than `gap` apart: a long run
    has more steps than a picture has pixels."""
    found: list[tuple[float, float]] = []
    for start, end in spans:
        if found and start <= found[-1][1] + gap:
            found[-1] = found[-1][0], max(found[-1][1], end)
        else:
            found.append((start, end))
    return found


def _fill(axes: Axes, kv: Mapping[str, Mapping[str, Any]], workers: Sequence[str]) -> None:
    """Draw shares of each pool: what conversations hold, and lighter, that and what is cached."""
    from matplotlib.lines import Line2D

    handles = []
    for number, worker in enumerate(workers):
        if worker not in kv:
            continue
        pool = kv[worker]
        full = 100 / max(pool["total"], 1)
        held = [full * pages for pages in pool["held"]]
        both = [full * (a + b) for a, b in zip(pool["held"], pool["cached"], strict=True)]
        look: dict[str, Any] = {"color": WORKERS[number % len(WORKERS)], "drawstyle": "steps-post"}
        axes.plot(pool["time"], both, linewidth=1, alpha=0.4, zorder=FRONT - 1, **look)
        axes.plot(pool["time"], held, linewidth=1.7, linestyle=DASHES[number // len(WORKERS)], zorder=FRONT, **look)
        handles.append(Line2D([], [], color=look["color"], linewidth=1.7, label=worker))
    axes.set_ylim(0, 102)
    ticks(axes.yaxis, range(0, 101, 25))
    axes.set_ylabel("KV pool in use, %")
    axes.set_xlabel("time, s")
    handles.append(Line2D([], [], color="#888888", linewidth=1.7, label="held"))
    handles.append(Line2D([], [], color="#888888", linewidth=1, alpha=0.6, label="held and cached"))
    axes.legend(handles=handles, loc="lower left", bbox_to_anchor=(0, 1), ncols=len(handles), borderaxespad=0.2)
