"""From times of tokens to the figures of a report, worked out by hand."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest

from miniserve.bench.replay.metrics import (
    ConversationTimes,
    Latency,
    TurnTimes,
    groups,
    latency,
    normalised,
    percentile,
    seconds,
    summary,
)

# Arrives at 10; its tool takes 2 seconds. TTFT 1 and 0.5, TTFET 3.5 - 2, last-turn TBT 2/4, E2E 5.5 - 2.
TWO = ConversationTimes(
    "two", 10.0, [TurnTimes(10, 11, 11, 100, 0, 1), TurnTimes(13, 13.5, 15.5, 120, 90, 5)], gaps=2.0, tools=2.0
)
# One turn of one token: no TBT. TTFT = TTFET = E2E = 4.
ONE = ConversationTimes("one", 20.0, [TurnTimes(20, 24, 24, 50, None, 1)])
FAILED = ConversationTimes("failed", 30.0, [TurnTimes(30, 31, 32, 7, 5, 3), TurnTimes(33, 0, 0, 9, 0, 0, "refused")])


def test_latency_of_a_conversation() -> None:
    assert latency(TWO) == Latency(ttft=(1, 0.5), ttfet=1.5, tbt=0.5, e2e=3.5)
    assert latency(ONE) == Latency(ttft=(4,), ttfet=4, tbt=None, e2e=4)
    assert (TWO.failed, FAILED.failed) == (False, True)


@pytest.mark.parametrize("count", [1, 2, 7, 100])
def test_percentiles_are_numpys(count: int) -> None:
    values = [random.Random(count).expovariate(1) for _ in range(count)]
    result = seconds(values)
    assert result is not None
    assert list(result) == ["p50", "p95", "p99"]
    assert list(result.values()) == pytest.approx(np.percentile(values, (50, 95, 99)))
    assert [percentile(sorted(values), q) for q in (0, 1)] == [min(values), max(values)]


def test_normalised() -> None:
    pairs = [(8.0, 1.0), (1.0, 1.0), (6.0, 2.0), (5.0, 0.0)]  # The last has no ratio.
    assert normalised(pairs) == {
        "gmean": pytest.approx(24 ** (1 / 3)),
        "p50": 3,
        "p95": pytest.approx(np.percentile([1, 3, 8], 95)),
    }


def test_summary_without_standalone() -> None:
    result = summary([TWO, ONE, FAILED], None, duration=8.0)
    median = {key: value["p50"] for key, value in result.items() if key.endswith("_s") and isinstance(value, dict)}
    ends = {"e2e_s": 3.75, "group_e2e_s": 3.75}
    assert median == {"ttft_s": 1, "later_ttft_s": 0.5, "ttfet_s": 2.75, "last_turn_tbt_s": 0.5} | ends
    assert {key: value for key, value in result.items() if key not in median} == {
        "conversations": 3,
        "turns": 5,
        "output_tokens": 10,
        "duration_s": 8.0,
        "ttft_norm": None,
        "ttfet_norm": None,
        "last_turn_tbt_norm": None,
        "e2e_norm": None,
        "slo_violation": {"ttfet": None, "last_turn_tbt": None, "e2e": None},
        "throughput": {"conversations_per_s": 0.25, "output_tokens_per_s": 1.25},
        "cached_tokens": 95,  # One server does not report them.
        "prompt_tokens": 286,
        "errors": 1,
    }


def test_a_group_ends_with_its_last_sub_agent() -> None:
    """The parent waits 6 s, of which its tool takes 2, and ends at 9; a sub-agent ends at 7, one in the background at
    11. What sub-agents' own tools take counts: the parent waits for it."""
    turns = [TurnTimes(0, 1, 2, 9, 0, 5), TurnTimes(8, 8.5, 9, 20, 9, 2)]
    parent = ConversationTimes("p", 0.0, turns, gaps=6.0, tools=2.0)
    joined = ConversationTimes("p/0", 2.0, [TurnTimes(2, 3, 3, 9, 0, 1), TurnTimes(6, 6, 7, 9, 0, 2)], 3.0, 3.0, parent)
    background = ConversationTimes("p/1", 9.0, [TurnTimes(9, 10, 11, 9, 0, 5)], parent=parent)
    failed = ConversationTimes("p/2", 2.0, FAILED.turns, parent=parent)
    assert groups([parent, joined]) == [9 - 2]
    assert groups([background, joined, TWO, parent]) == [3.5, 11 - 2]
    assert groups([parent, joined, failed, ONE]) == [4]
    assert latency(parent).e2e == 9 - 6


def test_summary_is_normalised_by_the_same_conversation_alone() -> None:
    alone = {"two": Latency((0.5, 0.5), 0.5, 0.25, 1.75), "one": Latency((1.0,), 1.0, None, 1.0)}
    result = summary([ONE, TWO], alone, duration=8.0)
    assert result["ttft_norm"] == {"gmean": pytest.approx(2), "p50": 2, "p95": pytest.approx(3.8)}  # 2, 1, 4
    assert result["ttfet_norm"] == {"gmean": pytest.approx(math.sqrt(12)), "p50": 3.5, "p95": pytest.approx(3.95)}
    assert result["last_turn_tbt_norm"] == {"gmean": pytest.approx(2), "p50": 2, "p95": 2}
    assert result["e2e_norm"] == {"gmean": pytest.approx(math.sqrt(8)), "p50": 3, "p95": pytest.approx(3.9)}
    assert result["slo_violation"] == {"ttfet": 0, "last_turn_tbt": 0, "e2e": 0}


def test_slo_violations_are_more_than_five_times_standalone_or_failed() -> None:
    # ONE took 5 times standalone to its last first token, which is kept; a little more in all, which is not.
    alone = {"two": Latency((1.0, 1.0), 1.0, 0.09, 3.5), "one": Latency((0.8,), 0.8, None, 0.79)}
    violation = summary([TWO, ONE], alone, 8.0)["slo_violation"]
    assert violation == {"ttfet": 0, "last_turn_tbt": 1, "e2e": 0.5}
    violation = summary([TWO, ONE, FAILED], alone, 8.0)["slo_violation"]
    assert violation == pytest.approx({"ttfet": 1 / 3, "last_turn_tbt": 1, "e2e": 2 / 3})
    # One that was not measured alone counts for none of them.
    assert summary([TWO, ONE], {"two": alone["two"]}, 8.0)["slo_violation"]["e2e"] == 0


def test_nothing_gives_nothing() -> None:
    result = summary([], None, 0.0)
    assert seconds([]) is normalised([]) is result["ttft_s"] is result["e2e_s"] is result["e2e_norm"] is None
    assert result["throughput"] == {"conversations_per_s": 0, "output_tokens_per_s": 0}
    assert (result["conversations"], result["turns"], result["errors"]) == (0, 0, 0)
    failed = summary([FAILED], None, 4.0)
    assert failed["ttft_s"] is failed["later_ttft_s"] is None
    assert failed["throughput"] == {"conversations_per_s": 0, "output_tokens_per_s": 0.75}
