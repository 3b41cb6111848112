"""Traces of all formats, and what is wrong with broken ones."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from miniserve.bench.replay.traces import read_trace
from miniserve.bench.replay.workload import Script, TurnSize
from miniserve.config import ConfigError

HEADER = "conversation_id,turn,new_input_tokens,output_tokens"
ROUNDS = "session_id,arrival_time,round_idx,prefix_len,input_len,output_len,tool_wait_after_ms"


def written(path: Path, name: str, content: str | bytes) -> Path:
    file = path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


def request(ms: float, prompt: int, output: int, *ids: int) -> str:
    return json.dumps({"timestamp": ms, "input_length": prompt, "output_length": output, "hash_ids": ids})


# CSV


def test_csv_turns_of_interleaved_conversations(tmp_path: Path) -> None:
    rows = ["b,0,100,7", "a,0,50,5", "b,1,3,9", "", "a,1,4,1"]
    scripts = read_trace(written(tmp_path, "t.csv", "\n".join([HEADER, *rows, ""])))
    assert scripts == [
        Script("b", (TurnSize(100, 7), TurnSize(3, 9))),
        Script("a", (TurnSize(50, 5), TurnSize(4, 1))),
    ]


def test_csv_columns_in_any_order_with_gaps_and_arrivals(tmp_path: Path) -> None:
    text = (
        "\ufeffoutput_tokens, turn,gap_s,conversation_id,arrival_s,new_input_tokens\r\n"
        '7,0,,"late, one",2.5,100\r\n5,0,0,early,0.5,50\r\n9,1,1e-1,"late, one",,3\r\n'
    )
    assert read_trace(written(tmp_path, "trace", text)) == [
        Script("early", (TurnSize(50, 5),), 0.5),
        Script("late, one", (TurnSize(100, 7), TurnSize(3, 9, 0.1)), 2.5),
    ]


@pytest.mark.parametrize(
    ("text", "line", "what"),
    [
        ("", 1, "no turns"),
        ("a,0,5,5\na,1,5,5\n", 2, "unknown field `a`; the first line is a header: conversation_id,turn,"),
        ("conversation_id,turn,output_tokens\na,0,5\n", 2, "missing required field `new_input_tokens`"),
        (f"{HEADER},priority\na,0,5,5,1\n", 2, "unknown field `priority`"),
        (f"{HEADER}\n", 1, "no turns"),
        (f"{HEADER}\na,0,5,5\n\na,1,5\n", 4, "3 values for the 4 columns"),
        (f"{HEADER}\na,0,5,5\na,1,5,5,5\n", 3, "5 values"),
        (f"{HEADER}\n,0,5,5\n", 2, "missing required field `conversation_id`"),
        (f"{HEADER}\na,0,5,5\na,0,5,5\n", 3, "turn 0 of conversation 'a' should be turn 1"),
        (f"{HEADER}\na,0,5,5\na,2,5,5\n", 3, "turn 2 of conversation 'a' should be turn 1"),
        (f"{HEADER}\na,1,5,5\na,0,5,5\n", 2, "turn 1 of conversation 'a' should be turn 0"),
        (f"{HEADER}\na,0,0,5\n", 2, "Expected `int` >= 1 .*new_input_tokens"),
        (f"{HEADER}\na,0,5,-1\n", 2, "Expected `int` >= 1 .*output_tokens"),
        (f"{HEADER}\na,0,5,1.5\n", 2, "got `str` .*output_tokens"),
        (f"{HEADER}\na,0,True,5\n", 2, "new_input_tokens"),
        (f"{HEADER}\na,0,1_000,5\n", 2, "new_input_tokens"),
        (f"{HEADER}\na,0,5,{2**31}\n", 2, "Expected `int` <= 2147483647 .*output_tokens"),
        (f"{HEADER}\na,0,5,{'9' * 5000}\n", 2, "output_tokens"),
        (f"{HEADER}\na,nan,5,5\n", 2, "turn"),
        (f"{HEADER},gap_s\na,0,5,5,\na,1,5,5,nan\n", 3, "gap_s"),
        (f"{HEADER},gap_s\na,0,5,5,\na,1,5,5,-1\n", 3, "Expected `float` >= 0.0 .*gap_s"),
        (f"{HEADER},gap_s\na,0,5,5,\na,1,5,5,1e999\n", 3, "out of range .*gap_s"),
        (f"{HEADER},gap_s\na,0,5,5,3\n", 2, "gap_s of turn 0 should be 0"),
        (f"{HEADER},arrival_s\na,0,5,5,0\na,1,5,5,1\n", 3, "only turn 0 has an arrival_s"),
        (f'{HEADER}\na,0,5,5\n"a,1,5,5\n', 3, "unexpected end of data"),
        (f"{HEADER}\nä,0,5,5\n".encode("latin-1"), 2, "not UTF-8"),
    ],
)
def test_csv_that_is_broken(tmp_path: Path, text: str | bytes, line: int, what: str) -> None:
    with pytest.raises(ConfigError, match=rf"t\.csv, line {line}: .*{what}"):
        read_trace(written(tmp_path, "t.csv", text))


# TraceLab's CSV


def test_rounds_keep_a_prefix_of_what_was_said(tmp_path: Path) -> None:
    rows = [
        "7,1500,0,0,100,20,300",
        "3,500,0,40,60,10,0",  # A cache knew 40 tokens; this conversation has not said them.
        "7,1500,1,120,30,5,250.5",  # All of it stays.
        "7,1500,2,50,10,4,0",  # Compaction.
        "7,1500,3,70,6,1,9",  # 64 tokens were said: 6 of the prefix are new.
    ]
    wanted = [
        Script("3", (TurnSize(100, 10),), 0.5),
        Script("7", (TurnSize(100, 20), TurnSize(30, 5, 0.3), TurnSize(10, 4, 0.2505, 50), TurnSize(12, 1)), 1.5),
    ]
    assert read_trace(written(tmp_path, "t.csv", "\n".join([ROUNDS, *rows]))) == wanted
    assert [script.tokens for script in wanted] == [110, 155]
    # As `artifacts/trace_facts/csv_export` orders and names the columns; without arrivals none is known.
    text = "id,input_len,output_len,round_idx,tool_wait_after_ms,prefix_len\n0,5,2,0,1000,0\n0,6,1,1,0,4\n"
    assert read_trace(written(tmp_path, "t", text)) == [Script("0", (TurnSize(5, 2), TurnSize(6, 1, 1.0, 4)))]


@pytest.mark.parametrize(
    ("rows", "line", "what"),
    [
        ("", 1, "no turns"),
        ("0,0,0,0,5,5\n", 2, "6 values for the 7 columns"),
        (",0,0,0,5,5,0\n", 2, "missing required field `session_id`; the first line is a header: session_id,round_idx,"),
        ("0,0,0,0,5,5,\n", 2, "missing required field `tool_wait_after_ms`"),
        ("0,0,1,0,5,5,0\n", 2, "turn 1 of conversation '0' should be turn 0"),
        ("0,0,0,0,5,5,0\n0,0,0,0,5,5,0\n", 3, "turn 0 of conversation '0' should be turn 1"),
        ("0,0,0,-1,5,5,0\n", 2, "Expected `int` >= 0 .*prefix_len"),
        ("0,0,0,1.5,5,5,0\n", 2, "prefix_len"),
        ("0,0,0,0,0,5,0\n", 2, "Expected `int` >= 1 .*input_len"),
        ("0,0,0,0,5,0,0\n", 2, "Expected `int` >= 1 .*output_len"),
        ("0,0,0,0,5,5,-1\n", 2, "Expected `float` >= 0.0 .*tool_wait_after_ms"),
        ("0,-1,0,0,5,5,0\n", 2, "Expected `float` >= 0.0 .*arrival_time"),
        ("0,0,0,0,5,5,nan\n", 2, "tool_wait_after_ms"),
    ],
)
def test_rounds_that_are_broken(tmp_path: Path, rows: str, line: int, what: str) -> None:
    with pytest.raises(ConfigError, match=rf"t\.csv, line {line}: .*{what}"):
        read_trace(written(tmp_path, "t.csv", f"{ROUNDS}\n{rows}"))


# JSONL of scripts


def test_scripts_are_read_as_they_are(tmp_path: Path) -> None:
    child = Script("b/0", (TurnSize(5, 1, 0.5),), shared=("x", 3), block=64, after=1, until=3, prefix=12)
    scripts = [Script("a", (TurnSize(7, 2),), 2.0), Script("b", (TurnSize(9, 1), TurnSize(2, 2, 1.5, 4)), 1.0)]
    scripts[1] = replace(scripts[1], agents=(child,))
    lines = [msgspec.json.encode(script) for script in scripts]
    assert read_trace(written(tmp_path, "t.jsonl", b"\n\n".join(lines))) == scripts[::-1]
    text = '{"key": "c", "turns": [[3, 4], [5, 6, 0.5]]}'
    assert read_trace(written(tmp_path, "t", text)) == [Script("c", (TurnSize(3, 4), TurnSize(5, 6, 0.5)))]


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ('{"turns": [[1, 1]]}', "missing required field `key`"),
        ('{"key": "b", "turns": []}', "length >= 1"),
        ('{"key": "b", "turns": [[0, 1]]}', r"`int` >= 1 .*turns"),
        ('{"key": "b", "turns": [[1, 0]]}', r"`int` >= 1 .*turns"),
        ('{"key": "b", "turns": [[1, 1, -1]]}', r"`float` >= 0.0 .*turns"),
        ('{"key": "b", "turns": [[1, 1, 0, -1]]}', r"`int` >= 0 .*turns"),
        ('{"key": "b", "turns": [[1, 1]], "prefix": -1}', r"`int` >= 0 .*prefix"),
        ('{"key": "a", "turns": [[1, 1]]}', "key 'a' is there twice"),
        ('{"key": "b", "turns": [[1, 1]]', "truncated"),
    ],
)
def test_scripts_that_are_broken(tmp_path: Path, line: str, what: str) -> None:
    with pytest.raises(ConfigError, match=rf"t\.jsonl, line 3: .*({what})"):
        read_trace(written(tmp_path, "t.jsonl", '{"key": "a", "turns": [[1, 1]]}\n\n' + line))


# Mooncake's JSONL


def test_requests_become_conversations(tmp_path: Path) -> None:
    lines = [
        request(10_000, 1500, 100, 0, 1, 2),  # Line 1. Block 0 is a system prompt that all have.
        request(10_000, 1200, 50, 0, 3, 4),
        request(13_000, 1700, 10, 0, 1, 9, 10),  # Continues line 1, which has two full blocks.
        request(14_500, 1705, 20, 0, 1, 9, 10),  # Continues that: longer by less than the answer.
        request(15_000, 2000, 1, 0, 3, 11, 12),  # Continues line 2.
        "",
        request(15_000, 700, 1, 0, 13),  # Has the system prompt only; not the next turn of anything.
        request(16_000, 3000, 1, 0, 14, 15, 16, 17, 18),
        request(17_000, 900, 1, 20, 21),
        request(17_000, 400, 1, 22),
    ]
    assert read_trace(written(tmp_path, "t.jsonl", "\n".join(lines))) == [
        Script("line-1", (TurnSize(1500, 100), TurnSize(100, 10, 3.0), TurnSize(1, 20, 1.5)), 0.0, shared=(0,)),
        Script("line-2", (TurnSize(1200, 50), TurnSize(750, 1, 5.0)), 0.0, shared=(0,)),
        Script("line-7", (TurnSize(700, 1),), 5.0, shared=(0,)),
        Script("line-8", (TurnSize(3000, 1),), 6.0, shared=(0,)),
        Script("line-9", (TurnSize(900, 1),), 7.0),
        Script("line-10", (TurnSize(400, 1),), 7.0),
    ]


def test_a_request_continues_one_at_most_and_the_longest(tmp_path: Path) -> None:
    lines = [
        request(0, 600, 1, 1, 2),
        request(1, 600, 1, 1, 2),  # The same again: no longer than the first.
        request(2, 1100, 1, 1, 2, 3),  # Continues line 1.
        request(3, 1150, 1, 1, 2, 4),  # Continues it too; not line 1, which has a successor.
        request(3, 1200, 1, 1, 2, 4),  # Comes at the same time as its predecessor: its own, and line 1 has gone on.
        request(9, 1300, 1, 1, 7, 8),  # An edited history.
        request(10, 1800, 1, 1, 7, 9, 10),  # Continues the edited one, not line 1, which shares less.
    ]
    scripts = read_trace(written(tmp_path, "t.ndjson", "\n".join(lines)))
    assert [(script.key, [turn.new for turn in script.turns]) for script in scripts] == [
        ("line-1", [600, 499, 49]),
        ("line-2", [600]),
        ("line-5", [1200]),
        ("line-6", [1300, 499]),
    ]
    assert [script.shared for script in scripts] == [(1,), (1,), (1, 2), (1,)]


@pytest.mark.timeout(20)  # Quadratic time would take minutes.
def test_many_requests_with_one_prompt_are_read_in_linear_time(tmp_path: Path) -> None:
    lines = [request(n, 600, 1, 1, 2) for n in range(25_000)]
    assert len(read_trace(written(tmp_path, "t.jsonl", "\n".join(lines)))) == 25_000


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("{", "malformed|truncated"),
        ("[1]", "Expected `object`"),
        ("7", "Expected `object`"),
        ('{"timestamp": 1, "input_length": 5, "output_length": 5}', "missing required field `hash_ids`"),
        (request(1, 5, 5, 1)[:-1] + ', "priority": 1}', "unknown field `priority`"),
        (request(1, 5, 5, 1).replace("5", "true", 1), "got `bool`.*input_length"),
        (request(float("nan"), 5, 5, 1), "malformed"),
        (request(-1, 5, 5, 1), r"timestamp"),
        (request(1e18, 5, 5, 1), r"timestamp"),
        (request(1, 0, 5), "input_length"),
        (request(1, 5, 0, 1), "output_length"),
        (request(1, 5, 2**31, 1), "output_length"),
        (request(1, 5, 5, -1), "hash_ids"),
        (request(1, 5, 5), "0 hash_ids; 5 tokens have 1"),
        (request(1, 1024, 5, 1, 2, 3), "3 hash_ids; 1024 tokens have 2"),
        (request(0.5, 5, 5, 1), "timestamp 0.5 is before the 1 of the line above"),
        (b"\xff", "not UTF-8"),
    ],
)
def test_requests_that_are_broken(tmp_path: Path, line: str | bytes, what: str) -> None:
    first = (request(1, 5, 5, 0) + "\n\n").encode()
    file = written(tmp_path, "t.jsonl", first + (line if isinstance(line, bytes) else line.encode()))
    with pytest.raises(ConfigError, match=rf"t\.jsonl, line 3: .*({what})"):
        read_trace(file)


def test_the_content_tells_the_format_where_the_name_does_not(tmp_path: Path) -> None:
    assert len(read_trace(written(tmp_path, "a", "\n" + request(0, 5, 5, 1)))) == 1
    with pytest.raises(ConfigError, match="no turns"):
        read_trace(written(tmp_path, "a.csv", request(0, 5, 5, 1)))
    with pytest.raises(ConfigError, match="no turns"):
        read_trace(written(tmp_path, "a.json", "\n"))
    with pytest.raises(ConfigError, match="cannot be read"):
        read_trace(tmp_path)
