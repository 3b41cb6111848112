"""How much of a prompt goes into a step beside streams."""

from __future__ import annotations

import pytest

from miniserve.cluster.messages import StepTime
from miniserve.worker.pace import LEAST_SHARE, Pace

LONE, TOKEN = 0.01, 0.001


def step(pace: Pace, rest: int = 10_000, streams: float = 0.0) -> float:
    """A step with as much of a prompt as it may take, beside streams that take `streams` seconds more than a lone one;
    how long it took."""
    tokens = min(pace.tokens, rest)
    seconds = LONE + streams + TOKEN * tokens
    pace.observe(StepTime(tokens, 0, 2, 100, seconds))
    return seconds


def lone(pace: Pace, seconds: float = LONE) -> None:
    pace.observe(StepTime(0, 0, 1, 100, seconds))


@pytest.mark.parametrize("streams", [0.0, 0.005, 0.015])
def test_steps_come_to_rest_at_the_stretch(streams: float) -> None:
    pace = Pace(512, 6.0)
    assert pace.tokens == 512
    lone(pace)
    lone(pace, 0.02)  # the shortest counts
    for _ in range(12):
        seconds = step(pace, streams=streams)
    assert seconds == pytest.approx(6 * LONE, rel=0.05)


def test_a_prompt_always_gets_on() -> None:
    pace = Pace(512, 6.0)
    lone(pace)
    for _ in range(20):
        step(pace, streams=0.5)
    assert pace.tokens == 512 // LEAST_SHARE
    for _ in range(20):
        step(pace)
    assert pace.tokens == pytest.approx(50, abs=2), "and more when the streams are gone"


def test_the_short_rest_of_a_prompt_says_nothing() -> None:
    pace = Pace(512, 6.0)
    lone(pace)
    for _ in range(12):
        step(pace)
    before = pace.tokens
    for _ in range(50):
        step(pace, rest=3)
    assert pace.tokens == before


def test_without_a_stream_s_step_to_compare_with_nothing_changes() -> None:
    pace = Pace(512, 6.0)
    step(pace)
    assert pace.tokens == 512


def test_what_is_shortest_is_forgotten_in_time() -> None:
    """A machine that has become slower: after some thousand steps its lone steps count."""
    pace = Pace(512, 6.0)
    lone(pace)
    for _ in range(2000):
        lone(pace, 0.03)
    for _ in range(12):
        seconds = step(pace)
    assert seconds == pytest.approx(6 * 0.03, rel=0.05)
