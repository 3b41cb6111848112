"""Nothing reads or writes a page on one stream while another stream may still write it."""

from __future__ import annotations

import pytest

from tests.support.fake_cuda.log import Line
from tests.support.fake_cuda.order import begins, ends, unordered
from tests.support.fake_cuda.stand_in import StandIn

COUNTED = {
    "swapping": ("offloaded", "restored"),
    "snapshots": ("offloaded", "restored", "saved", "used"),
    "handing over": ("published", "asked", "aborted"),
}
BROKEN = [
    ("swapping", "follow"),
    ("swapping", "lead"),
    ("handing over", "follow"),
    ("handing over", "stored"),
    ("handing over", "abandon"),
]


@pytest.mark.long
@pytest.mark.parametrize("scene", COUNTED)
def test_all_accesses_to_pages_are_in_order(stand_in: StandIn, scene: str) -> None:
    """Also what the host writes to pinned memory, and reads there: those would be problems."""
    result = stand_in.run("order", scene, "")
    assert all(result.found["counted"][what] > 0 for what in COUNTED[scene]), result.found["counted"]
    streams = {stream for found in result.found["streams"].values() for stream in found}
    assert len(streams) > 1, "copies are made beside the steps"
    assert not result.problems
    assert result.found["unordered"] == []


@pytest.mark.long
@pytest.mark.parametrize(("scene", "rule"), BROKEN, ids=str)
def test_a_broken_rule_is_noticed(stand_in: StandIn, scene: str, rule: str) -> None:
    assert stand_in.run("order", scene, rule).found["unordered"]


def line(stream: int, number: int, clock: dict[int, int], what: str) -> Line:
    return Line("L", stream, number, {**clock, stream: number}, f"note {what}")


@pytest.mark.parametrize("waits", [False, True])
@pytest.mark.parametrize(("reads", "writes"), [([], [("pool", 3)]), ([("pool", 3)], []), ([("other", 3)], [])])
def test_order_is_what_clocks_say(waits: bool, reads: list[tuple[str, int]], writes: list[tuple[str, int]]) -> None:
    known = {1: 2} if waits else {1: 1}
    lines = [
        line(1, 1, {}, begins(1, "a step", [("pool", 2)], [("pool", 3)])),
        line(1, 2, {}, ends(1)),
        line(2, 1, known, begins(2, "a copy", reads, writes)),
        line(2, 2, known, ends(2)),
    ]
    touched = not waits and ("pool", 3) in reads + writes
    assert unordered(lines) == (["a copy after a step: ('pool', 3)"] if touched else [])


def test_a_write_waits_for_all_that_have_read() -> None:
    page = [("pool", 1)]
    lines = [
        line(1, 1, {}, begins(1, "a write", [], page)),
        line(1, 2, {}, ends(1)),
        line(2, 1, {1: 2}, begins(2, "a read", page, [])),
        line(2, 2, {1: 2}, ends(2)),
        line(1, 3, {}, begins(3, "another write", [], page)),
        line(1, 4, {}, ends(3)),
    ]
    assert unordered(lines) == ["another write after a read: ('pool', 1)"]
