"""Traces, made-up workloads, and what is done to them before a replay."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

from miniserve.bench.replay.generators import COUNT, generate, load
from miniserve.bench.replay.traces import TraceError, read_trace
from miniserve.bench.replay.workload import Shape, Spread, Task, Text, TurnSize, arrivals, choose, generator
from miniserve.config import ConfigError

HEADER = "conversation_id,turn,new_input_tokens,output_tokens"


def written(path: Path, name: str, content: str | bytes) -> Path:
    file = path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return file


def request(ms: float, prompt: int, output: int, *ids: int) -> str:
    return json.dumps({"timestamp": ms, "input_length": prompt, "output_length": output, "hash_ids": ids})


# CSV


def test_csv_turns_of_interleaved_conversations(tmp_path: Path) -> None:
    rows = ["b,0,100,7", "a,0,50,5", "b,1,3,9", "", "a,1,4,1"]
    tasks = read_trace(written(tmp_path, "t.csv", "\n".join([HEADER, *rows, ""])))
    assert tasks == [
        Task("b", (TurnSize(100, 7), TurnSize(3, 9))),
        Task("a", (TurnSize(50, 5), TurnSize(4, 1))),
    ]


def test_csv_columns_in_any_order_with_gaps_and_arrivals(tmp_path: Path) -> None:
    text = (
        "\ufeffoutput_tokens, turn,gap_s,conversation_id,arrival_s,new_input_tokens\r\n"
        '7,0,,"late, one",2.5,100\r\n5,0,0,early,.5,50\r\n9,1,1e-1,"late, one",,3\r\n'
    )
    assert read_trace(written(tmp_path, "trace", text)) == [
        Task("early", (TurnSize(50, 5),), 0.5),
        Task("late, one", (TurnSize(100, 7), TurnSize(3, 9, 0.1)), 2.5),
    ]


@pytest.mark.parametrize(
    ("text", "line", "what"),
    [
        ("", 1, "no column conversation_id, turn, .* is a header"),
        ("a,0,5,5\n", 1, "no column"),
        ("conversation_id,turn,output_tokens\n", 1, "no column new_input_tokens;"),
        (f"{HEADER},priority\n", 1, "'priority' is unknown"),
        (f"{HEADER},turn\n", 1, "'turn' appears twice"),
        (f"{HEADER}\n", 1, "no turns"),
        (f"{HEADER}\na,0,5,5\n\na,1,5\n", 4, "3 values for the 4 columns"),
        (f"{HEADER}\na,0,5,5\na,1,5,5,5\n", 3, "5 values"),
        (f"{HEADER}\n,0,5,5\n", 2, "conversation_id is empty"),
        (f"{HEADER}\na,0,5,5\na,0,5,5\n", 3, "turn 0 of conversation 'a' should be turn 1"),
        (f"{HEADER}\na,0,5,5\na,2,5,5\n", 3, "turn 2 of conversation 'a' should be turn 1"),
        (f"{HEADER}\na,1,5,5\na,0,5,5\n", 2, "turn 1 of conversation 'a' should be turn 0"),
        (f"{HEADER}\na,0,0,5\n", 2, "new_input_tokens is '0'; .* from 1 to 2147483647"),
        (f"{HEADER}\na,0,5,-1\n", 2, "output_tokens is '-1'"),
        (f"{HEADER}\na,0,5,1.0\n", 2, "output_tokens is '1.0'"),
        (f"{HEADER}\na,0,True,5\n", 2, "new_input_tokens is 'True'"),
        (f"{HEADER}\na,0,1_000,5\n", 2, "new_input_tokens is '1_000'"),
        (f"{HEADER}\na,0,5,{2**31}\n", 2, "output_tokens is '2147483648'"),
        (f"{HEADER}\na,0,5,{'9' * 5000}\n", 2, "output_tokens"),
        (f"{HEADER}\na,nan,5,5\n", 2, "turn is 'nan'"),
        (f"{HEADER},gap_s\na,0,5,5,\na,1,5,5,nan\n", 3, "gap_s is 'nan'"),
        (f"{HEADER},gap_s\na,0,5,5,\na,1,5,5,-1\n", 3, "gap_s is '-1'"),
        (f"{HEADER},gap_s\na,0,5,5,\na,1,5,5,1e999\n", 3, "gap_s is '1e999'"),
        (f"{HEADER},gap_s\na,0,5,5,\na,1,5,5,\n", 3, "gap_s is ''"),
        (f"{HEADER},gap_s\na,0,5,5,3\n", 2, "gap_s of turn 0 should be 0"),
        (f"{HEADER},arrival_s\na,0,5,5,\n", 2, "arrival_s is ''"),
        (f"{HEADER},arrival_s\na,0,5,5,0\na,1,5,5,1\n", 3, "arrival_s is '1'; only turn 0"),
        (f'{HEADER}\na,0,5,5\n"a,1,5,5\n', 3, "unexpected end of data"),
        (f"{HEADER}\nä,0,5,5\n".encode("latin-1"), 2, "not UTF-8"),
    ],
)
def test_csv_that_is_broken(tmp_path: Path, text: str | bytes, line: int, what: str) -> None:
    with pytest.raises(TraceError, match=rf"t\.csv, line {line}: .*{what}"):
        read_trace(written(tmp_path, "t.csv", text))


# Mooncake's JSONL


def test_requests_become_conversations(tmp_path: Path) -> None:
    lines = [
        request(10_000, 1500, 100, 0, 1, 2),  # Line 1. Block 0 is everybody's system prompt.
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
        Task("line-1", (TurnSize(1500, 100), TurnSize(100, 10, 3.0), TurnSize(1, 20, 1.5)), 0.0, shared=(0,)),
        Task("line-2", (TurnSize(1200, 50), TurnSize(750, 1, 5.0)), 0.0, shared=(0,)),
        Task("line-7", (TurnSize(700, 1),), 5.0, shared=(0,)),
        Task("line-8", (TurnSize(3000, 1),), 6.0, shared=(0,)),
        Task("line-9", (TurnSize(900, 1),), 7.0),
        Task("line-10", (TurnSize(400, 1),), 7.0),
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
    tasks = read_trace(written(tmp_path, "t.ndjson", "\n".join(lines)))
    assert [(task.key, [turn.new for turn in task.turns]) for task in tasks] == [
        ("line-1", [600, 499, 49]),
        ("line-2", [600]),
        ("line-5", [1200]),
        ("line-6", [1300, 499]),
    ]
    assert [task.shared for task in tasks] == [(1,), (1,), (1, 2), (1,)]


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
    with pytest.raises(TraceError, match=rf"t\.jsonl, line 3: .*({what})"):
        read_trace(file)


def test_the_content_tells_the_format_where_the_name_does_not(tmp_path: Path) -> None:
    assert len(read_trace(written(tmp_path, "a", "\n" + request(0, 5, 5, 1)))) == 1
    with pytest.raises(TraceError, match="no column"):
        read_trace(written(tmp_path, "a.csv", request(0, 5, 5, 1)))
    with pytest.raises(TraceError, match="no turns"):
        read_trace(written(tmp_path, "a.json", "\n"))
    with pytest.raises(TraceError, match="cannot be read"):
        read_trace(tmp_path)


# Made-up workloads


def test_swe_agent_has_the_sizes_of_its_trace() -> None:
    """The figures are those of the trace (outputs) and the paper (first prompts); see the generator."""
    tasks = generate("swe-agent", 2000, seed=1)
    outputs = np.array([[turn.output for turn in task.turns] for task in tasks])
    first = [task.turns[0].new for task in tasks]
    assert np.percentile(first, (5, 50, 95)) == pytest.approx((12_240, 15_890, 17_295), rel=0.02)
    assert {turn.new for task in tasks for turn in task.turns[1:]} == {67}
    assert np.median(outputs, axis=0) == pytest.approx((102, 40, 49, 54, 105, 192, 250, 296, 316, 334), rel=0.1)
    assert np.mean(outputs) == pytest.approx(306, rel=0.08)
    for turns, share in ((5, 0.506), (10, 0.315)):
        total = np.sort(outputs[:, :turns].sum(axis=1))
        assert total[-200:].sum() / total.sum() == pytest.approx(share, abs=0.05)
    ranks = outputs[:, 3:].argsort(axis=0).argsort(axis=0)
    correlation = np.corrcoef(ranks.T)[np.triu_indices(7, 1)].mean()
    assert correlation == pytest.approx(0.125, abs=0.03)


def test_chat_and_deep_research_keep_to_their_ranges() -> None:
    chat = generate("chat", 1000, seed=1)
    assert np.percentile([task.turns[0].new for task in chat], (5, 50, 95)) == pytest.approx((97, 220, 500), rel=0.15)
    assert np.mean([turn.output for task in chat for turn in task.turns]) == pytest.approx(248, rel=0.1)
    assert np.mean([len(task.turns) for task in chat]) == pytest.approx(3, rel=0.1)
    gaps = [turn.gap for task in chat for turn in task.turns[1:]]
    assert np.percentile(gaps, (5, 95)) == pytest.approx((10, 62), rel=0.15)

    research = generate("deep-research", 300, seed=1)
    later = [turn for task in research for turn in task.turns[1:]]
    assert {len(task.turns) for task in research} == set(range(5, 16))
    assert all(2000 <= task.turns[0].new <= 4000 for task in research)
    assert all(1000 <= turn.new <= 8000 and 100 <= turn.output <= 600 and 1 <= turn.gap <= 30 for turn in later)
    assert np.median([turn.new for turn in later]) == pytest.approx(8**0.5 * 1000, rel=0.1)


@pytest.mark.parametrize("name", ["swe-agent", "chat", "deep-research", "mix:swe-agent=1,chat=3"])
def test_a_task_depends_on_its_number_and_the_seed_only(name: str) -> None:
    tasks = generate(name, 40, seed=3)
    assert generate(name, 7, seed=3) == tasks[:7]
    assert len({task.key for task in tasks}) == 40
    assert {task.turns for task in generate(name, 40, seed=4)}.isdisjoint(task.turns for task in tasks)
    assert all(task.turns[0].gap == 0 and task.arrival is None and not task.shared for task in tasks)


def test_a_mix_has_its_shares() -> None:
    keys = [task.key for task in generate("mix:swe-agent=1, chat=3", 1000, seed=0)]
    assert sum(key.startswith("chat") for key in keys) == pytest.approx(750, abs=50)
    assert [int(key.rpartition("-")[2]) for key in keys] == list(range(1000))


@pytest.mark.parametrize("name", ["mix:", "mix:a=1", "mix:chat", "mix:chat=0", "mix:chat=nan", "mix:chat=1,chat=1"])
def test_a_mix_that_is_broken(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name!r} is no mix: .* known are swe-agent, chat, deep-research"):
        load(name, 1, seed=0)


def test_load_takes_a_path_or_a_name(tmp_path: Path) -> None:
    file = written(tmp_path, "t.csv", "\n".join([HEADER, *(f"{n},0,{n + 1},1" for n in range(20))]))
    assert load(str(file), None, seed=0) == read_trace(file)
    assert load(str(file), 5, seed=0) == choose(read_trace(file), 5, seed=0)
    assert load("chat", None, seed=2) == generate("chat", COUNT, seed=2)
    assert load("chat", 0, seed=2) == []
    for wrong in (str(tmp_path / "none.csv"), "swe_agent", ""):
        with pytest.raises(ConfigError, match=r"swe-agent, chat, deep-research, or a mix|cannot be read"):
            load(wrong, None, seed=0)


# What is done to tasks


@pytest.mark.parametrize(
    ("text", "spread"),
    [
        ("5", ("fixed", 5, 5)),
        ("0..30", ("uniform", 0, 30)),
        ("log:67..8000", ("log", 67, 8000)),
        ("exp:10", ("exp", 10, 10)),
    ],
)
def test_spread_is_parsed(text: str, spread: tuple[str, float, float]) -> None:
    assert Spread.parse(text) == spread


@pytest.mark.parametrize("text", ["", "a", "-1", "nan", "inf", "5..", "..5", "5..1", "log:0..5", "log:5", "exp:1..2"])
def test_spread_that_is_broken(text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(repr(text)) + " is not a number or distribution"):
        Spread.parse(text)


def test_spread_draws_what_it_says() -> None:
    rng = generator(0, "test")
    draws = {text: np.array([Spread.parse(text).draw(rng) for _ in range(4000)]) for text in ("0..30", "exp:10")}
    logs = np.log([Spread.parse("log:10..1000").draw(rng) for _ in range(4000)])
    assert Spread.parse("5").draw(rng) == 5
    assert np.percentile(draws["0..30"], (25, 75)) == pytest.approx((7.5, 22.5), rel=0.1)
    assert draws["exp:10"].mean() == pytest.approx(10, rel=0.1)
    assert np.median(draws["exp:10"]) == pytest.approx(10 * np.log(2), rel=0.1)
    assert np.percentile(np.exp(logs), (0, 50, 100)) == pytest.approx((10, 100, 1000), rel=0.1)


def test_shape_cuts_scales_and_replaces() -> None:
    task = Task("a", (TurnSize(1000, 10), TurnSize(67, 4, 1.5), TurnSize(67, 4, 2.5), TurnSize(9, 9, 9)), 3.0, (1,))
    assert Shape().apply(task, 0) == task
    assert (task.tokens, task.gaps) == (1170, 13.0)
    assert Shape(max_turns=2, scale=0.1).apply(task, 0) == Task(
        "a", (TurnSize(100, 1), TurnSize(7, 1, 1.5)), 3.0, (1,), block=51
    )
    shape = Shape(gap=Spread.parse("1..9"), append=Spread.parse("100..200"))
    shaped = shape.apply(task, 0)
    assert shaped.turns[0] == task.turns[0]
    assert all(100 <= turn.new <= 200 and 1 <= turn.gap <= 9 for turn in shaped.turns[1:])
    assert len({turn.gap for turn in shaped.turns}) == 4
    assert shape.apply(task, 0) == shaped != shape.apply(task, 1)


def test_choose_draws_each_once_before_any_twice() -> None:
    tasks = [Task(str(n), (TurnSize(n + 1, 1),)) for n in range(10)]
    assert choose(tasks, None, 0) == tasks
    few = choose(tasks, 4, 0)
    assert len(set(few)) == 4
    assert set(few) < set(tasks)
    assert few == choose(tasks, 4, 0) != choose(tasks, 4, 1)
    many = choose(tasks, 25, 0)
    assert set(many[:10]) == set(tasks)
    assert len({task.key for task in many}) == 25
    assert {task.turns for task in many[10:20]} == {task.turns for task in tasks}
    timed = [Task(str(n), (TurnSize(1, 1),), arrival=float(n)) for n in range(10)]
    assert choose(timed, 4, 0) == timed[:4]


def test_arrivals() -> None:
    assert arrivals("fixed", 4.0, 3, seed=0) == [0, 0.25, 0.5]
    for kind in ("poisson", "burst"):
        times = arrivals(kind, 2.0, 4001, seed=0)
        assert times[0] == 0
        assert times == sorted(times) == arrivals(kind, 2.0, 4001, seed=0) != arrivals(kind, 2.0, 4001, seed=1)
        assert 4000 / times[-1] == pytest.approx(2.0, rel=0.15)
    poisson = np.diff(arrivals("poisson", 2.0, 4001, seed=0))
    assert poisson.std() == pytest.approx(0.5, rel=0.1)
    _, sizes = np.unique(arrivals("burst", 2.0, 21, seed=0, burst=8), return_counts=True)
    assert sizes.tolist() == [8, 8, 5]
    assert arrivals("poisson", 2.0, 0, seed=0) == []


def test_text_is_a_task_s_own_but_for_shared_blocks() -> None:
    def text(key: str, *shared: int, seed: int = 0) -> list[int]:
        return Text(Task(key, (TurnSize(30, 1),), shared=shared, block=10), seed, 5, 1000).take(30)

    alone, one, two = text("a"), text("b", 1, 2), text("c", 1, 3)
    assert one[:10] == two[:10]
    assert len({tuple(tokens[10:20]) for tokens in (alone, one, two)}) == 3
    assert len({tuple(tokens[20:]) for tokens in (alone, one, two, text("b", 1, 2, seed=1))}) == 4
    assert all(5 <= token < 1000 for tokens in (alone, one, two) for token in tokens)
    assert one == text("b", 1, 2)


def test_text_goes_on_where_it_left_off() -> None:
    task = Task("a", (TurnSize(10, 1),), shared=(1,), block=7)
    parts = Text(task, 0)
    assert parts.take(3) + parts.take(5) + parts.take(1) + parts.take(11) == Text(task, 0).take(20)
