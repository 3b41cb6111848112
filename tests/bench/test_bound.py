"""The bound of what any scheduler can do, on traces that are worked out by hand."""

import msgspec
import pytest

from miniserve.bench.replay.metrics import ConversationTimes, TurnTimes
from miniserve.bench.replay.workload import Script, TurnSize
from miniserve.bench.simulate.hardware import PRESETS
from miniserve.bench.simulate.run import bound, steady
from tests.support.simulated import PLAIN

DEVICE = msgspec.structs.replace(PLAIN, per_sequence=0.002, kv_tokens=10_000, page_tokens=10)


def test_one_kind_of_device() -> None:
    """A turn of 100 tokens and 11 outputs takes 0.1 s of prefill and ten times 2 ms; one step of a lone stream takes 12
    ms, five times as much 60, of which 10 read the weights."""
    found = bound([Script("a", (TurnSize(100, 11),))], [DEVICE] * 3, 1)
    assert found["device_seconds"] == pytest.approx({"first_prefill": 0.1, "appends": 0.0, "decode": 0.02})
    assert found["compute"] == pytest.approx(3 * (1 - 10 / 60) / 0.12)
    held = 0.1 * 100 + 10 * 0.012 * (100 + 11 / 2)
    assert found["memory"] == pytest.approx(3 * 10_000 / held)
    assert found["conversations_per_s"] == found["compute"]
    assert found["links"] == pytest.approx(1e6 / (100 * 1000))


def test_memory_may_be_less_than_compute() -> None:
    small = msgspec.structs.replace(DEVICE, kv_tokens=100)
    found = bound([Script("a", (TurnSize(100, 101),))], [small], 0)
    assert found["conversations_per_s"] == found["memory"] < found["compute"]
    assert found["links"] is None


def test_later_turns_read_what_is_there_and_every_kind_of_work_goes_where_it_is_cheapest() -> None:
    reads = msgspec.structs.replace(DEVICE, per_context=1e-4, per_kv_token=1e-5)
    slow_prompts = msgspec.structs.replace(reads, name="other", per_token=1.0)
    script = Script("a", (TurnSize(100, 1), TurnSize(50, 3)))
    one, two = bound([script], [reads], 0), bound([script], [reads, slow_prompts], 0)
    assert one["device_seconds"]["appends"] == pytest.approx(50 * 0.001 + 101 * 1e-4)
    assert one["device_seconds"]["decode"] == pytest.approx(2 * 0.002 + 1e-5 * 2 * (151 + 1.5))
    assert two["device_seconds"] == one["device_seconds"]
    assert two["compute"] == pytest.approx(2 * one["compute"])


def test_what_is_compacted_away_is_not_read_and_a_parent_s_prefix_is_not_computed() -> None:
    reads = msgspec.structs.replace(DEVICE, per_context=1e-4, per_kv_token=1e-5)
    script = Script("a", (TurnSize(100, 1), TurnSize(50, 3, keep=40)), prefix=60)
    seconds = bound([script], [reads], 0)["device_seconds"]
    assert seconds["first_prefill"] == pytest.approx(100 * 0.001 + 60 * 1e-4)
    assert seconds["appends"] == pytest.approx(50 * 0.001 + 40 * 1e-4)
    assert seconds["decode"] == pytest.approx(2 * 0.002 + 1e-5 * 2 * (90 + 1.5))


def test_the_paper_s_cell() -> None:
    """Five turns of 16k tokens and some output each: prefill and appends as the paper's artifact has them."""
    script = Script("a", (TurnSize(16_000, 100), *(TurnSize(67, 150) for _ in range(4))))
    found = bound([script], [PRESETS["a40-qwen3-0.6b"]] * 4, 1)
    assert found["device_seconds"]["first_prefill"] == pytest.approx(0.585, rel=0.01)
    assert found["device_seconds"]["appends"] == pytest.approx(4 * 0.0164, rel=0.03)
    assert 1 < found["conversations_per_s"] < 2


def test_steady_state_counts_ends_between_the_first_and_the_last_counted_arrival() -> None:
    ends = [0.5, 2.0, 3.0, 9.0]
    times = [ConversationTimes(str(end), 0.0, [TurnTimes(0.0, end, end, 1, 0, 1)]) for end in ends]
    assert steady(times, 1.0, 5.0, bound=2.0) == {"conversations_per_s": 0.5, "bound_share": 0.25}
    assert steady(times, 1.0, 1.0, bound=2.0) is None
