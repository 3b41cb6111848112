"""When workers are replaced, by a clock of our own."""

from __future__ import annotations

from miniserve.cluster import health
from miniserve.cluster.health import Health


def test_a_worker_that_serves_and_falls_silent_is_noticed() -> None:
    seen = Health(timeout=10.0)
    assert seen.silent(1e9) == {}
    for name in ("d0", "p0"):
        seen.started(name, 90.0)
        seen.ready(name, 95.0)
    seen.heard("d0", 100.0)
    seen.heard("p0", 105.0)
    assert seen.silent(110.0) == {}
    assert seen.silent(111.0) == {"d0": 11.0}
    seen.died("d0", 111.0)
    assert seen.silent(112.0) == {}, "nothing is expected of the dead"
    assert seen.silent(124.0) == {"p0": 19.0}


def test_the_first_start_takes_what_it_takes() -> None:
    seen = Health(timeout=10.0)
    seen.started("d0", 0.0)
    assert seen.silent(1e6) == {}
    seen.ready("d0", 1e6)
    assert seen.silent(1e6 + 11) == {"d0": 11.0}


def test_a_worker_that_loads_again_may_be_silent_for_the_timeout() -> None:
    seen = Health(timeout=100.0)
    seen.started("d0", 0.0)
    seen.ready("d0", 3.0)
    seen.died("d0", 50.0)
    seen.started("d0", 60.0)
    assert seen.silent(160.0) == {}, "it counts as heard at its start"
    assert seen.silent(161.0) == {"d0": 101.0}
    seen.heard("d0", 161.0)
    assert seen.silent(261.0) == {}, "and whenever it comes further"
    assert seen.silent(262.0) == {"d0": 101.0}
    seen.died("d0", 262.0)
    assert seen.silent(1e6) == {}, "what died while it loaded is expected nothing of either"


def test_or_for_longer_where_its_first_start_was_long() -> None:
    seen = Health(timeout=10.0)
    seen.started("d0", 0.0)
    seen.heard("d0", 30.0)
    seen.ready("d0", 40.0)
    for start in (100.0, 1000.0):
        seen.died("d0", start)
        seen.started("d0", start)
        limit = health.SLOWER * 40.0
        assert seen.silent(start + limit) == {}
        assert seen.silent(start + limit + 1) == {"d0": limit + 1}
        seen.ready("d0", start + limit)  # slow, but there: the measure stays the first start's
        assert seen.silent(start + limit + 11) == {"d0": 11.0}, "once it serves the timeout is the limit again"


def test_each_death_doubles_the_delay_until_no_more() -> None:
    seen = Health(timeout=10.0)
    assert [seen.died("d0", now) for now in (1.0, 2.0, 3.0, 4.0, 5.0)] == [0.5, 1.0, 2.0, 4.0, None]
    assert seen.died("p0", 5.0) == 0.5, "each worker by itself"


def test_old_deaths_do_not_count() -> None:
    seen = Health(timeout=10.0)
    for round_number in range(20):
        assert seen.died("d0", round_number * (health.WINDOW + 1)) == 0.5


def test_silence_while_nobody_could_listen_is_excused() -> None:
    health = Health(10.0)
    health.started("d0", 0.0)
    health.ready("d0", 1.0)
    health.excuse(100.0)
    assert health.silent(105.0) == {}
    assert health.silent(112.0) == {"d0": 11.0}
