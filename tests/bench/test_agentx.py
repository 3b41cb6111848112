"""scripts/agentx.py: sessions of AgentX as scripts, and what is wrong with broken ones."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import msgspec
import pytest

from miniserve.bench.replay.traces import read_trace
from miniserve.bench.replay.workload import Script, TurnSize
from scripts import agentx


def call(t: float, prompt: int, output: int, *ids: int, took: float = 1.0, **more: Any) -> dict[str, Any]:
    return {"t": t, "type": "n", "model": "m", "in": prompt, "out": output, "hash_ids": ids, "api_time": took} | more


def nested(t: float, *calls: dict[str, Any], **more: Any) -> dict[str, Any]:
    named = {"agent_id": "agent_001", "subagent_type": "Explore", "duration_ms": None, "status": "completed"}
    return {"t": t, "type": "subagent", "requests": calls, "models": ["m"], **named} | more


def session(*entries: dict[str, Any], **more: Any) -> dict[str, Any]:
    about = {"id": "s", "models": ["m"], "block_size": 10, "hash_id_scope": "local", "tool_tokens": 5}
    return about | {"requests": entries, "totals": {"rounds": 2}} | more


def converted(*entries: dict[str, Any]) -> Script:
    return agentx.script(msgspec.convert(session(*entries), agentx.Session))


def test_a_prompt_goes_on_loses_its_end_or_is_compacted() -> None:
    """Every prompt is as long as in the trace; a gap is from the end of the call before."""
    found = converted(
        call(0, 45, 10, 1, 2, 3, 4),
        call(3, 62, 0, 1, 2, 3, 4, 5, 6, took=2.0, type="s"),  # All of 55, and 7 more; an output of 0 is one of 1.
        call(8, 63, 9, 1, 2, 3, 4, 5, 6),  # As long as the prompt and its answer: the prompt alone stays.
        call(9, 31, 5, 1, 2, 20, api_time=None),  # Begins before the last one has ended.
        call(12, 20, 5, 1, 2),  # A part of the one before: its last token is new.
    )
    assert found == Script(
        "s",
        (
            TurnSize(45, 10),
            TurnSize(7, 1, 2.0),
            TurnSize(1, 9, 3.0, 62),
            TurnSize(11, 5, 0.0, 20),
            TurnSize(1, 5, 3.0, 19),
        ),
        block=10,
    )
    lengths, said = [], 0
    for turn in found.turns:
        lengths.append(min(said, turn.keep) + turn.new)
        said = lengths[-1] + turn.output
    assert lengths == [45, 62, 63, 31, 20]


def test_sub_agents_begin_after_a_turn_and_are_waited_for() -> None:
    found = converted(
        call(0, 40, 10, 1, 2, 3, 4),
        # Side by side. Times count from each one's start, as the first one's show.
        nested(2, call(0.5, 25, 4, 1, 2, took=2.0), call(3.5, 40, 4, 1, 2, 30, 31, took=1.0)),
        nested(2, call(1, 20, 4, 50, 51, took=9.5), agent_id="agent_002"),
        nested(2, call(1.5, 30, 4, 50, 52, 53, took=60.0), agent_id="in the background"),
        call(7, 60, 10, 1, 2, 3, 4, 5, 6),
        call(20, 80, 10, 1, 2, 3, 4, 5, 6, 7, 8),
        nested(23, agent_id="asked nothing"),
    )
    first, second, third = found.agents
    assert first == Script("s/0", (TurnSize(5, 4, 1.5), TurnSize(11, 4, 1.0)), block=10, after=0, until=1, prefix=20)
    assert second == Script("s/1", (TurnSize(20, 4, 2.0),), shared=("s/50",), block=10, after=0, until=2)
    assert third == Script("s/2", (TurnSize(30, 4, 2.5),), shared=("s/50",), block=10, after=0, until=3)
    # The gaps of the agent: since the end of the first sub-agent at 6.5, and of the second at 12.5.
    assert found.turns == (TurnSize(40, 10), TurnSize(10, 10, 0.5), TurnSize(10, 10, 7.5))


def test_times_of_sub_agents_may_count_from_the_start_of_the_session() -> None:
    found = converted(call(0, 40, 10, 1, 2, 3, 4), nested(2, call(2.5, 25, 4, 1, 2)), call(9, 60, 9, 1, 2, 3, 4))
    assert [(agent.turns[0].gap, agent.until) for agent in found.agents] == [(1.5, 1)]


def test_agents_without_names_are_found_by_their_blocks() -> None:
    """A title of another model, two workers that fork from the agent, one of which is compacted, and the agent."""
    found = converted(
        call(0, 20, 5, 90, 91, model="small"),
        call(1, 40, 5, 1, 2, 3, 4),
        call(3, 50, 5, 1, 2, 10, 11, 12),
        call(3.5, 50, 5, 1, 2, 20, 21, 22),
        call(5, 60, 5, 1, 2, 10, 11, 12, 13),
        call(5.5, 40, 5, 1, 2, 20, 23),
        call(8, 60, 5, 1, 2, 3, 4, 5, 6),
        call(9.5, 70, 5, 1, 2, 3, 4, 5, 6, 7),
    )
    assert [turn.new for turn in found.turns] == [40, 15, 5]
    assert [agent.prefix for agent in found.agents] == [0, 20, 20]
    assert [agent.turns for agent in found.agents] == [
        (TurnSize(20, 5),),
        (TurnSize(30, 5, 1.0), TurnSize(5, 5, 1.0)),
        (TurnSize(30, 5, 1.5), TurnSize(10, 5, 1.0, 30)),
    ]
    assert [(agent.after, agent.until) for agent in found.agents] == [(0, 1), (0, 1), (0, 1)]


def test_the_script_reads_files_and_writes_a_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pretty, lines = tmp_path / "pretty.json", tmp_path / "lines.jsonl"
    one = session(call(0, 12, 1, 1), nested(1, call(0, 12, 1, 1)))
    pretty.write_text(json.dumps(one, indent=2))
    lines.write_text("\n".join(json.dumps(one | {"id": name}) for name in "xy") + "\n")
    assert agentx.main([str(pretty), str(lines)]) == 0
    trace = tmp_path / "agents.jsonl"
    trace.write_text(capsys.readouterr().out)
    scripts = read_trace(trace)
    assert [script.key for script in scripts] == ["s", "x", "y"]
    assert all(script.agents[0].prefix == 10 and script.agents[0].key == f"{script.key}/0" for script in scripts)
    assert agentx.main([str(pretty), str(pretty)]) == 1
    assert "session 's' is there twice" in capsys.readouterr().err
    assert agentx.main([str(tmp_path / "none")]) == 1
    assert "none: cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("{]}", "malformed"),
        ("[1]}", "Expected `object`, got `array`"),
        (session(id=7), r"Expected `str`.*\.id"),
        (session(block_size=0), r"`int` >= 1.*block_size"),
        (session(hash_id_scope="global"), r"Invalid enum value 'global'.*hash_id_scope"),
        (session(), "session 's' has no requests of its own"),
        (session(nested(0, call(0, 5, 5))), "session 's' has no requests of its own"),
        (session(call(0, 5, 5, type="x")), r"Invalid value 'x'.*requests\[0\]"),
        (session(call(-1, 5, 5)), r"`float` >= 0.0.*requests\[0\]\.t"),
        (session(call(0, 0, 5)), r"`int` >= 1.*requests\[0\]\.in"),
        (session(call(0, 5, -1)), r"`int` >= 0.*requests\[0\]\.out"),
        (session(call(0, 5, 5, took=-1)), r"`float` >= 0.0.*api_time"),
        (session(call(0, 5, 5), nested(0, call(0, 5, "x"))), r"requests\[1\]\.requests\[0\]\.out"),
        (session(call(0, 25, 5, 1, 2, 3, 4)), r"4 hash_ids; 25 tokens have 3 \(10 each\)"),
        (session(call(0, 25, 5), nested(0, call(0, 5, 5, 1, 2))), r"2 hash_ids; 5 tokens have 1 \(10 each\)"),
    ],
)
def test_sessions_that_are_broken(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], line: str | dict[str, Any], what: str
) -> None:
    file = tmp_path / "t.jsonl"
    broken = line if isinstance(line, str) else json.dumps(line)
    file.write_text(f"{json.dumps(session(call(0, 5, 5), id='a'))}\n\n{broken}\n")
    assert agentx.main([str(file)]) == 1
    error = capsys.readouterr().err
    assert "t.jsonl, line 3: " in error
    assert 'a session is {"id": name, "block_size": 64, "requests": [' in error
    assert re.search(what, error)
