"""Sentences of problems.toml: each is used, and gets the fields that it has."""

from __future__ import annotations

import ast
import string
from pathlib import Path

import miniserve
from miniserve.config import PROBLEMS, problem

CALLS = [
    node
    for path in Path(miniserve.__file__).parent.rglob("*.py")
    for node in ast.walk(ast.parse(path.read_text("utf-8")))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "problem"
]


def test_each_sentence_is_used_and_gets_its_fields() -> None:
    used: set[str] = set()
    for call in CALLS:
        name = ast.literal_eval(call.args[0])
        table, _, key = name.partition(".")
        fields = {field for _, field, _, _ in string.Formatter().parse(PROBLEMS[table][key]) if field}
        assert {keyword.arg for keyword in call.keywords} == fields, name
        used.add(name)
    assert used == {f"{table}.{key}" for table, rows in PROBLEMS.items() for key in rows}


def test_braces_of_examples_stay() -> None:
    assert '{"role": "user", "content": "Hi"}' in problem("llm.messages", given=5)
