"""The docs name files, functions and states that exist."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))

from scripts import state_diagrams  # noqa: E402

PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
FILE = re.compile(r"`([\w./-]+/[\w-]+\.(?:py|cpp|h|sh|md|toml)|[\w/]+/)`")


def definitions(file: Path) -> set[str]:
    """`function`, `Class` and `Class.method` of all that a file defines."""
    found = set()
    for node in ast.parse(file.read_text("utf-8")).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {
                f"{node.name}.{n.name}" for n in node.body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)
            }
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_that_the_docs_name_exist(page: Path) -> None:
    rooms = [ROOT, ROOT / "miniserve", *(p for p in (ROOT / "miniserve").iterdir() if p.is_dir()), ROOT / "docs"]
    named = set(FILE.findall(page.read_text("utf-8")))
    missing = {name for name in named if not any((room / name).exists() for room in rooms)}
    assert not missing


def test_every_function_of_a_turns_life_is_where_the_page_says() -> None:
    page = (ROOT / "docs" / "life_of_a_turn.md").read_text("utf-8")
    rows = re.findall(r"^\| `([\w/]+\.py)` \| `([\w.]+)` \|", page, re.M)
    assert len(rows) > 30
    wrong = [row for row in rows if row[1] not in definitions(ROOT / "miniserve" / row[0])]
    assert not wrong


def test_every_noun_has_the_class_that_the_page_names() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text("utf-8")
    wrong = []
    for classes, file in re.findall(r"((?:`\w+`(?:, )?)+) \(`([\w/]+\.py)`\)", page):
        known = definitions(ROOT / "miniserve" / file)
        wrong += [(name, file) for name in re.findall(r"\w+", classes) if name not in known]
    assert not wrong


def test_the_diagrams_are_those_of_the_tables() -> None:
    page = state_diagrams.PAGE.read_text("utf-8")
    assert page == state_diagrams.drawn(page), "run scripts/state_diagrams.py"
