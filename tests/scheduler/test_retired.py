"""Workers that are to go, over made-up workers."""

from __future__ import annotations

import msgspec

from miniserve.cluster.messages import Report, WorkerStats
from tests.support.outputs import outputs
from tests.support.scheduling import STATS, report, run_of, scheduler, submit


def test_a_prefiller_stays_until_its_last_pages_are_fetched() -> None:
    made = scheduler("p0", "d0", policy="disaggregated")
    run = run_of(submit(made, "a", [1] * 200))[1]
    assert run.prefill_at == "p0"
    made.retire("p0", 0.0)
    made.on_report("p0", Report(outputs(run.turn, 0, [5], cached_tokens=0), [], leases(1)), 1.0)
    assert not made.retired("p0")
    made.on_report("p0", Report([], [], leases(0)), 2.0)
    assert made.retired("p0")


def test_a_turn_that_begins_again_does_not_wait_for_a_home_that_is_to_go() -> None:
    made = scheduler("p0", "d0", "d1", policy="disaggregated")
    home, run = run_of(submit(made, "a", [1] * 200))
    made.retire(home, 0.0)
    report(made, "p0", run.turn, 0, 5, cached_tokens=0)
    made.worker_down("p0", returns=False)
    other = run_of(report(made, home, run.turn, 0, 6, cached_tokens=0))[0]
    assert {home, other} == {"d0", "d1"}


def leases(count: int) -> WorkerStats:
    return msgspec.structs.replace(STATS, leases=count)
