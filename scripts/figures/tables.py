"""The cells of a comparison as tables, for a report and for a terminal; and how tables and figures group them.

A cell is one result (docs/evaluation.md) plus `label`, the series it belongs to, `seed`, and `mispredict`, the share of
the per-turn policy's predictions that were made wrong. Cells that differ only in their seed are averaged.
"""

import math
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from miniserve.scheduler.baselines import POLICIES

Cell = dict[str, Any]
SHOWN = tuple(POLICIES)
"""Policies, in the order of rows and lines."""

PREDICTS = "ampd"
"""The only policy that predicts, so that `mispredict` matters."""
USUAL_MISPREDICT = 0.1
"""The share of wrong predictions that the paper compares with."""
GOOD = 0.01
"""A rate is sustained where less than this share of conversations breaks each SLO."""
SLOS = "ttfet", "last_turn_tbt", "e2e"
NONE = "-"
COLUMNS: list[dict[str, Any]] = tomllib.loads(Path(__file__).with_name("columns.toml").read_text("utf-8"))["columns"]


class Spread(NamedTuple):
    """A figure over the seeds that measured it."""

    mean: float
    low: float
    high: float


def measured(cells: Sequence[Cell], *path: str) -> Spread | None:
    """The figure at `path` (keys, outermost first) over cells; None if none of them has it."""
    values = [value for cell in cells if (value := _value(cell, path)) is not None]
    return Spread(math.fsum(values) / len(values), min(values), max(values)) if values else None


def _value(cell: Cell, path: Sequence[str]) -> float | None:
    found: Any = cell
    for key in path:
        found = found.get(key) if isinstance(found, dict) else None
    return float(found) if isinstance(found, int | float) and math.isfinite(found) else None


def predicts(cell: Cell) -> bool:
    return cell["policy"] == PREDICTS and cell.get("mispredict") is not None


def by_series(cells: Sequence[Cell]) -> dict[str, list[Cell]]:
    """Cells by the name of their series: the label, with the share of wrong predictions where a label has several."""
    several = {label for label, shares in _mispredicted(cells).items() if len(shares) > 1}
    found: dict[str, list[Cell]] = {}
    for cell in sorted(cells, key=_place):
        wrong = f", {100 * cell['mispredict']:g} % wrong" if predicts(cell) and cell["label"] in several else ""
        found.setdefault(cell["label"] + wrong, []).append(cell)
    return found


def usual(cells: Sequence[Cell]) -> list[Cell]:
    """Without a sweep over wrong predictions: each label keeps the share for which it has the most rates, of several
    such shares the one nearest to the paper's."""
    kept = {
        label: min(shares, key=lambda share: (-len(shares[share]), abs(share - USUAL_MISPREDICT)))
        for label, shares in _mispredicted(cells).items()
    }
    return [cell for cell in cells if not predicts(cell) or cell["mispredict"] == kept[cell["label"]]]


def by_rate(cells: Sequence[Cell]) -> dict[float, list[Cell]]:
    rates = sorted({cell["rate"] for cell in cells})
    return {rate: [cell for cell in cells if cell["rate"] == rate] for rate in rates}


def goodput(cells: Sequence[Cell], label: str) -> float | None:
    """The highest rate tested at which fewer than 1 % of conversations broke each of the three SLOs, all of them
    measured; None if there is no such rate."""
    mine = by_series(cells).get(label) or by_series(usual(cells)).get(label, [])
    return max((rate for rate, those in by_rate(mine).items() if _good(those)), default=None)


def markdown(cells: Sequence[Cell]) -> str:
    tables = []
    for title, head, rows in _tables(cells):
        lines = [_line(head).replace("\n", " "), _line(["---", *["---:"] * (len(head) - 1)]), *map(_line, rows)]
        tables.append("\n".join([f"**{title}**", "", *lines, ""]))
    return "\n".join(tables)


def print_tables(cells: Sequence[Cell], console: Console) -> None:
    """The same for a terminal, without the columns that no cell has."""
    for title, head, rows in _tables(cells):
        shown = [n for n in range(len(head)) if n == 0 or any(row[n].strip(f"{NONE} /") for row in rows)]
        table = Table(box=SIMPLE_HEAD, show_edge=False, padding=0)
        table.add_column(head[0], overflow="fold", min_width=14)
        for n in shown[1:]:
            table.add_column(head[n].replace(" / ", "/"), justify="right", no_wrap=True)
        for row in rows:
            table.add_row(Text(row[0]), *(row[n].replace(" / ", "/") for n in shown[1:]))
        console.print(Text(title, "bold"), table, "", sep="\n")


def _line(row: Sequence[str]) -> str:
    escaped = (value.replace("|", r"\|") for value in row)
    return f"| {' | '.join(escaped)} |"


def _tables(cells: Sequence[Cell]) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    series = by_series(cells)
    head = ["Policy", *(column["head"] for column in COLUMNS), "Errors"]
    for rate, those in by_rate(cells).items():
        seeds = len({cell.get("seed") for cell in those})
        title = f"At {rate:g} conversations/s, times standalone" + (f" (means of {seeds} seeds)" if seeds > 1 else "")
        at = {name: [cell for cell in mine if cell["rate"] == rate] for name, mine in series.items()}
        rows = [[name, *_row(mine)] for name, mine in at.items() if mine]
        yield title, head, rows
    if cells:
        kept = usual(cells)
        names = [name for name, mine in series.items() if any(cell in kept for cell in mine)]
        title = f"Goodput: the highest rate tested with < {100 * GOOD:g} % violations of each SLO"
        yield title, ["Policy", "conversations/s"], [[name, _number(goodput(cells, name), "g")] for name in names]


def _row(cells: Sequence[Cell]) -> Iterator[str]:
    for column in COLUMNS:
        found = [_mean(cells, *path) for path in column["paths"]]
        yield " / ".join(_number(mean and mean * column.get("factor", 1)) for mean in found)
    # Not a mean: one error in any seed is worth a look.
    yield str(sum(cell.get("errors") or 0 for cell in cells))


def _mean(cells: Sequence[Cell], *path: str) -> float | None:
    found = measured(cells, *path)
    return found.mean if found else None


def _number(value: float | None, spec: str = "") -> str:
    """Three significant digits, or as in `spec`."""
    if value is None:
        return NONE
    size = abs(value)
    return format(value, spec or (".2f" if 0 < size < 9.995 else ".1f" if 0 < size < 99.95 else ".0f"))


def _good(cells: Sequence[Cell]) -> bool:
    shares = [_mean(cells, "slo_violation", slo) for slo in SLOS]
    return all(share is not None and share < GOOD for share in shares)


def _mispredicted(cells: Sequence[Cell]) -> dict[str, dict[float, set[float]]]:
    """Of each label that predicts: its shares of wrong predictions, and the rates tested with each."""
    found: dict[str, dict[float, set[float]]] = {}
    for cell in cells:
        if predicts(cell):
            found.setdefault(cell["label"], {}).setdefault(cell["mispredict"], set()).add(cell["rate"])
    return found


def _place(cell: Cell) -> tuple[int, str, float]:
    policy = cell["policy"]
    place = SHOWN.index(policy) if policy in SHOWN else len(SHOWN)
    return place, cell["label"], (cell.get("mispredict") or 0.0)
