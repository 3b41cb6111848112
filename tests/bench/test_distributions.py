"""What is drawn from a seed: distributions, chosen conversations, arrivals, token ids."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest

from miniserve.bench.replay.generators import WorkloadConfig
from miniserve.bench.replay.workload import Distribution, Script, Text, TurnSize, Workload, arrivals, choose, generator


@pytest.mark.parametrize(
    ("text", "distribution"),
    [
        ("5", ("fixed", 5, 5)),
        ("0..30", ("uniform", 0, 30)),
        ("log:67..8000", ("log", 67, 8000)),
        ("exp:10", ("exp", 10, 10)),
    ],
)
def test_spread_is_parsed(text: str, distribution: tuple[str, float, float]) -> None:
    assert Distribution.parse(text) == distribution


@pytest.mark.parametrize("text", ["", "a", "-1", "nan", "inf", "5..", "..5", "5..1", "log:0..5", "log:5", "exp:1..2"])
def test_spread_that_is_broken(text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(repr(text)) + " is not a number or distribution"):
        Distribution.parse(text)


def test_spread_draws_what_it_says() -> None:
    rng = generator(0, "test")
    draws = {text: np.array([Distribution.parse(text).draw(rng) for _ in range(4000)]) for text in ("0..30", "exp:10")}
    logs = np.log([Distribution.parse("log:10..1000").draw(rng) for _ in range(4000)])
    assert Distribution.parse("5").draw(rng) == 5
    assert np.percentile(draws["0..30"], (25, 75)) == pytest.approx((7.5, 22.5), rel=0.1)
    assert draws["exp:10"].mean() == pytest.approx(10, rel=0.1)
    assert np.median(draws["exp:10"]) == pytest.approx(10 * np.log(2), rel=0.1)
    assert np.percentile(np.exp(logs), (0, 50, 100)) == pytest.approx((10, 100, 1000), rel=0.1)


def test_shape_cuts_scales_and_replaces() -> None:
    script = Script("a", (TurnSize(1000, 10), TurnSize(67, 4, 1.5), TurnSize(67, 4, 2.5), TurnSize(9, 9, 9)), 3.0, (1,))
    assert WorkloadConfig(trace="t").apply(script, 0) == script
    assert script.tokens == 1170
    assert WorkloadConfig(trace="t", max_turns=2, scale_tokens=0.1).apply(script, 0) == Script(
        "a", (TurnSize(100, 1), TurnSize(7, 1, 1.5)), 3.0, (1,), block=51
    )
    shape = WorkloadConfig(trace="t", gap=Distribution.parse("1..9"), append=Distribution.parse("100..200"))
    shaped = shape.apply(script, 0)
    assert shaped.turns[0] == script.turns[0]
    assert all(100 <= turn.new <= 200 and 1 <= turn.gap <= 9 for turn in shaped.turns[1:])
    assert len({turn.gap for turn in shaped.turns}) == 4
    assert shape.apply(script, 0) == shaped != shape.apply(script, 1)


def test_shape_keeps_what_is_kept_and_sub_agents_of_turns_that_are_left() -> None:
    early = Script("a/0", (TurnSize(40, 10, 9.0), TurnSize(10, 10, 900)), block=10, after=0, prefix=50)
    late = Script("a/1", (TurnSize(40, 10),), block=10, after=1, until=2)
    turns = (TurnSize(100, 10), TurnSize(50, 10, 7200.0, 60), TurnSize(50, 10, 5.0, 0))
    script = Script("a", turns, block=10, agents=(early, late))
    assert script.tokens == 120
    assert WorkloadConfig(trace="t").apply(script, 0) == script
    shape = WorkloadConfig(trace="t", max_turns=1, scale_tokens=0.1)
    few = Script("a/0", (TurnSize(4, 1, 9.0),), block=1, prefix=5)
    assert shape.apply(script, 0) == Script("a", (TurnSize(10, 1),), block=1, agents=(few,))
    shaped = WorkloadConfig(trace="t", max_gap=60, scale_tokens=0.1).apply(script, 0)
    assert shaped.turns == (TurnSize(10, 1), TurnSize(5, 1, 60, 6), TurnSize(5, 1, 5.0, 0))
    assert [turn.gap for turn in shaped.agents[0].turns] == [9.0, 60]
    assert shaped.agents[1].after == 1


def test_choose_draws_each_once_before_any_twice() -> None:
    scripts = [Script(str(n), (TurnSize(n + 1, 1),)) for n in range(10)]
    assert choose(scripts, None, 0) == scripts
    few = choose(scripts, 4, 0)
    assert len(set(few)) == 4
    assert set(few) < set(scripts)
    assert few == choose(scripts, 4, 0) != choose(scripts, 4, 1)
    many = choose(scripts, 25, 0)
    assert set(many[:10]) == set(scripts)
    assert len({script.key for script in many}) == 25
    assert {script.turns for script in many[10:20]} == {script.turns for script in scripts}
    assert len({one.key for one in Workload(scripts=many, starts=[]).conversations}) == 25
    child = Script("3/x", (TurnSize(1, 1),))
    with_child = choose([replace(script, agents=(child,) if script.key == "3" else ()) for script in scripts], 30, 0)
    keys = [agent.key for script in with_child for agent in script.agents]
    assert keys == ["3/x", "3+1/x", "3+2/x"]
    timed = [Script(str(n), (TurnSize(1, 1),), arrival=float(n)) for n in range(10)]
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
    _, sizes = np.unique(arrivals("burst", 2.0, 21, seed=0), return_counts=True)
    assert sizes.tolist() == [8, 8, 5]
    assert arrivals("poisson", 2.0, 0, seed=0) == []


def test_text_is_a_scripts_own_but_for_shared_blocks() -> None:
    def text(key: str, *shared: int, seed: int = 0) -> list[int]:
        return Text(Script(key, (TurnSize(30, 1),), shared=shared, block=10), seed, (5, 1000)).take(30)

    alone, one, two = text("a"), text("b", 1, 2), text("c", 1, 3)
    assert one[:10] == two[:10]
    assert len({tuple(tokens[10:20]) for tokens in (alone, one, two)}) == 3
    assert len({tuple(tokens[20:]) for tokens in (alone, one, two, text("b", 1, 2, seed=1))}) == 4
    assert all(5 <= token < 1000 for tokens in (alone, one, two) for token in tokens)
    assert one == text("b", 1, 2)


def test_a_prompt_has_what_is_kept_and_what_is_new() -> None:
    script = Script("a", (TurnSize(10, 2), TurnSize(3, 2, 0.0, 4), TurnSize(1, 1)))
    own, text = Text(script, 0), Text(script, 0, said=[7, 8])
    first = [7, 8, *own.take(10)]
    assert text.prompt(script.turns[0]).tolist() == first
    text.said.extend([1, 2])
    second = first[:4] + own.take(3)
    assert text.prompt(script.turns[1]).tolist() == second
    text.said.extend([3])
    assert text.prompt(script.turns[2]).tolist() == [*second, 3, *own.take(1)]


def test_text_goes_on_where_it_left_off() -> None:
    script = Script("a", (TurnSize(10, 1),), shared=(1,), block=7)
    parts = Text(script, 0)
    assert parts.take(3) + parts.take(5) + parts.take(1) + parts.take(11) == Text(script, 0).take(20)
