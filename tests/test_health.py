"""When workers are replaced, by a clock of our own."""

from __future__ import annotations

from miniserve.cluster import health
from miniserve.cluster.health import Health


def test_only_workers_that_have_served_can_fall_silent() -> None:
    seen = Health(timeout=10.0)
    assert seen.silent(1e9) == []
    seen.heard("d0", 100.0)
    seen.heard("p0", 105.0)
    assert seen.silent(110.0) == []
    assert seen.silent(111.0) == ["d0"]
    seen.died("d0", 111.0)
    assert seen.silent(112.0) == [], "nothing is expected of the dead"
    seen.heard("d0", 113.0)
    assert seen.silent(124.0) == ["p0", "d0"] or seen.silent(124.0) == ["d0", "p0"]


def test_each_death_doubles_the_delay_until_no_more() -> None:
    seen = Health(timeout=10.0)
    assert [seen.died("d0", now) for now in (1.0, 2.0, 3.0, 4.0, 5.0)] == [0.5, 1.0, 2.0, 4.0, None]
    assert seen.died("p0", 5.0) == 0.5, "each worker by itself"


def test_old_deaths_do_not_count() -> None:
    seen = Health(timeout=10.0)
    for round_number in range(20):
        assert seen.died("d0", round_number * (health.WINDOW + 1)) == 0.5
