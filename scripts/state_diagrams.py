#!/usr/bin/env python3
"""Draws the diagrams of states in docs/architecture.md from the tables in the code: scripts/state_diagrams.py

A test holds the page against these tables; run this after you change one.
"""

from __future__ import annotations

import re
import sys
from enum import Enum
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from miniserve.scheduler import turns  # noqa: E402
from miniserve.states import Transitions  # noqa: E402
from miniserve.worker import sequence  # noqa: E402

PAGE = ROOT / "docs" / "architecture.md"
TABLES: dict[str, tuple[Transitions[Any], Enum]] = {
    "turn": (turns.TRANSITIONS, turns.TurnState.QUEUED),
    "sequence": (sequence.TRANSITIONS, sequence.State.WAITING),
}
"""The name of each diagram in the page, its table, and the state in which things begin."""


def diagram(table: Transitions[Any], first: Enum) -> str:
    """A table of transitions in Mermaid's language."""
    lines = [f"    [*] --> {first.value}"]
    for before, transitions in table.items():
        lines += [f"    {before.value} --> {after.value}: {why}" for after, why in transitions.items()]
    lines += [f"    {state.value} --> [*]" for state, transitions in table.items() if not transitions]
    return "\n".join(["```mermaid", "stateDiagram-v2", *lines, "```"])


def drawn(page: str) -> str:
    """The page with all of its diagrams as the tables are now."""
    for name, (table, first) in TABLES.items():
        begin, end = f"<!-- states of a {name} -->\n", f"\n<!-- end of {name} -->"
        pattern = re.escape(begin) + r".*?" + re.escape(end)
        page, count = re.subn(pattern, lambda _: begin + diagram(table, first) + end, page, flags=re.S)  # noqa: B023
        assert count == 1, f"{PAGE} has {count} places for the states of a {name}"
    return page


if __name__ == "__main__":
    PAGE.write_text(drawn(PAGE.read_text("utf-8")), "utf-8")
