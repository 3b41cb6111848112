"""Averages, quantiles and the fit of step times."""

from __future__ import annotations

import random

import pytest

from miniserve.cluster.messages import StepTime
from miniserve.scheduler.conversation import RESERVED_OUTPUT, Forecast, History, TurnRecord
from miniserve.scheduler.observations import Average, Speed, TimeAverage, quantile


def decode(batch: int, context: int) -> float:
    """The paper's A40 in seconds, for a batch that is not bound by launches."""
    return 5.7e-3 + 0.06e-3 * batch + 1.85e-7 * context


def prefill(tokens: int, pairs: int) -> float:
    return 5e-3 + 1.44e-5 * tokens + 2.77e-9 * pairs


def watched(noise: float, *, rounds: int = 500) -> Speed:
    pick, speed = random.Random(7), Speed()
    for _ in range(rounds):
        batch = pick.randint(1, 32)
        context = batch * pick.randint(200, 16_000)
        speed.observe(StepTime(0, 0, batch, context, decode(batch, context) * pick.uniform(1 - noise, 1 + noise)))
        tokens, before = pick.choice([2048, 2048, 700, 60]), pick.choice([0, 2048, 8192, 14_000])
        pairs = tokens * before + tokens * tokens // 2
        beside = pick.choice([0, 4])
        seconds = prefill(tokens, pairs) + (decode(4, 30_000) - decode(0, 0) if beside else 0)
        speed.observe(
            StepTime(tokens, pairs, beside, 30_000 * (beside > 0), seconds * pick.uniform(1 - noise, 1 + noise))
        )
    return speed


@pytest.mark.parametrize("noise", [0.0, 0.2])
def test_speed_learns_the_shape_of_a_worker(noise: float) -> None:
    speed = watched(noise)
    for batch, context in ((1, 12_000), (8, 64_000), (32, 400_000)):
        assert speed.decode(batch, context) == pytest.approx(decode(batch, context), rel=0.02 + 0.4 * noise)
    for tokens, before in ((2048, 0), (16_000, 0), (64, 16_000), (512, 4000)):
        steps = -(-tokens // 2048)
        wanted = steps * prefill(0, 0) + prefill(tokens, tokens * before + tokens * tokens // 2) - prefill(0, 0)
        assert speed.prefill(tokens, before) == pytest.approx(wanted, rel=0.03 + 0.5 * noise)


def test_what_was_seen_long_ago_is_not_forgotten_and_what_has_changed_is_learnt() -> None:
    speed = watched(0.0)
    for _ in range(20_000):
        speed.observe(StepTime(0, 0, 1, 500, decode(1, 500)))
    assert speed.decode(32, 400_000) == pytest.approx(decode(32, 400_000), rel=0.05)
    for _ in range(200):
        speed.observe(StepTime(0, 0, 1, 500, 2 * decode(1, 500)))
    assert speed.decode(1, 500) > 1.5 * decode(1, 500)


def test_a_worker_that_has_done_nothing_is_thought_to_be_like_the_others() -> None:
    fleet = Speed()
    old, new = Speed(fleet), Speed(fleet)
    assert old.prefill(100) == new.prefill(100) > 0
    for _ in range(20):
        old.observe(StepTime(512, 512 * 256, 0, 0, 0.25))
        old.observe(StepTime(0, 0, 2, 500, 0.03))
    assert new.prefill(512) == pytest.approx(0.25, rel=0.05)
    assert new.decode(2, 500) == pytest.approx(0.03, rel=0.05)


def test_estimates_are_never_negative() -> None:
    speed = Speed()
    for tokens, seconds in ((512, 0.1), (256, 0.2), (64, 0.4)):
        speed.observe(StepTime(tokens, tokens * tokens // 2, 0, 0, seconds))
    for tokens in (1, 16, 10_000):
        assert speed.prefill(tokens) >= 0
        assert speed.held_up(tokens) >= 0
    assert speed.prefill(0) == 0
    speed.observe(StepTime(512, 131_072, 8, 4000, 1e-6))
    assert speed.prefill(512) > 0


def test_one_hiccup_is_not_believed() -> None:
    speed = Speed()
    for _ in range(64):
        speed.observe(StepTime(0, 0, 1, 500, 0.01))
    speed.observe(StepTime(0, 0, 1, 500, 30.0))
    for _ in range(63):
        speed.observe(StepTime(0, 0, 1, 500, 0.01))
    assert speed.decode(1, 500) < 0.012


def test_averages() -> None:
    average, over_time = Average(4), TimeAverage(10.0)
    for value in (1, 2, 3, 100, 100, 100, 100, 100, 100, 100, 100):
        average.add(value)
    assert 90 < average.value < 100
    over_time.update(4.0, 1000.0)
    assert over_time.value == pytest.approx(4.0)
    over_time.update(0.0, 1007.0)
    assert over_time.value == pytest.approx(2.0, rel=0.01)
    assert quantile([], 0.5, 7.0) == 7.0
    assert quantile(range(999, 899, -1), 0.9, 0) == 990


def record(turn: int, output: int, gap: float | None = None) -> TurnRecord:
    return TurnRecord(turn, 0, gap, 100, 10, 0, output, 0, 0, 0, 0, 0, 0, 0, 0, 0, None, False, 1, 0)


def history(*records: TurnRecord) -> History:
    made = History()
    for one in records:
        made.append(one)
    return made


def test_output_is_what_this_conversation_has_shown_then_what_all_have() -> None:
    forecast, new = Forecast(), History()
    assert forecast.output(new, None) == RESERVED_OUTPUT
    assert forecast.output(new, 40) == 40
    for turn in range(1, 101):
        forecast.ended(record(turn, turn))
    assert forecast.output(new, None) == 91
    talker = history(*(record(turn, 500 * turn) for turn in range(1, 4)))
    assert forecast.output(talker, None) == 1500
    assert forecast.output(talker, 64) == 64


def test_outlook_is_the_own_gap_and_the_share_that_went_on() -> None:
    forecast, new = Forecast(), History()
    assert forecast.outlook(new, 1) == (0.0, 2 / 3)
    for n in range(100):
        forecast.ended(record(1, 10))
        if n % 2:
            forecast.arrived(1, 2.0)
    gap, chance = forecast.outlook(new, 1)
    assert (gap, chance) == (2.0, pytest.approx(0.5, abs=0.02))
    slow = history(*(record(turn, 10, gap=60.0) for turn in range(2, 5)))
    assert forecast.outlook(slow, 9)[0] == 60.0
