"""What each policy decides, from made-up observations."""

from __future__ import annotations

import pytest

from miniserve.cluster.messages import Move, StepTime
from miniserve.scheduler.baselines import POLICIES, Ampd, make_policy
from miniserve.scheduler.conversation import Conversation
from miniserve.scheduler.observe import Observe
from miniserve.scheduler.placement import Need, Placement
from miniserve.scheduler.prompts import Known
from miniserve.scheduler.workers import Cluster, WorkerView
from tests.support.peers import peer

PAGE, CHUNK, TOKEN, STEP = 16, 512, 1e-3, 0.02
"""Every worker here takes a millisecond for a token of a prompt, 20 for a decode step, and 5 more for each sequence."""


def worker(name: str, *, turns: int = 0, pages: int = 1000, queued: int = 0, resident: int = 0) -> WorkerView:
    made = WorkerView(peer(name, pages=pages, page_bytes=1000), 64, PAGE)
    for tokens in (16, 64, 256, CHUNK, CHUNK):
        made.speed.observe(StepTime(tokens, tokens * tokens // 2, 0, 0, TOKEN * tokens))
    for batch in (1, 2, 4, 8, 16):
        made.speed.observe(StepTime(0, 0, batch, 100 * batch, STEP + 0.005 * (batch - 1)))
    for _ in range(turns):
        made.change(1, 10, 0.0)
    made.resident = made.wanted = resident
    made.queued_prefill_tokens = queued
    return made


def cluster(*workers: WorkerView, closed: tuple[str, ...] = (), bandwidth: float = 0.0) -> Cluster:
    made = Cluster(PAGE)
    for each in workers:
        made.join(each)
    made.open = {w.name for w in workers} - set(closed)
    for source in workers:
        for destination in workers:
            if bandwidth and source is not destination:
                made.moved(Move("t", source.name, 1, int(bandwidth), 1.0, history=True), destination.name)
    return made


def need(tokens: int = 1000, output: int = 100, home: str | None = None, turns: int = 0, **known: int) -> Need:
    conversation = Conversation(1, home=home, turns=turns, active=1)
    of = Known([], PAGE)
    of.update(known)
    return Need(conversation, tokens, output, (tokens + output) // PAGE + 1, of, 0.0)


def where(placement: Placement | None) -> tuple[str, str] | None:
    return None if placement is None else (placement.option.home, placement.option.prefill_at)


@pytest.mark.parametrize("name", POLICIES)
def test_every_policy_takes_the_decoder_with_the_most_free_kv_and_waits_where_nothing_fits(name):
    policy = make_policy(name)
    some = cluster(worker("d0", resident=500), worker("d1", resident=100))
    assert where(policy.place(need(), some)) == ("d1", "")
    full = worker("d0", turns=64)
    assert policy.place(need(), cluster(full)) is None
    assert policy.place(need(home="d0", turns=1, d0=900), cluster(full)) is None
    assert policy.place(need(), cluster(worker("d0"), closed=("d0",))) is None
    assert where(policy.place(need(20_000), cluster(worker("d0")))) == ("d0", ""), "one turn alone always fits"


@pytest.mark.parametrize("name", ["colocated", "disaggregated", "ampd", "conserve"])
def test_first_and_later_turns(name):
    policy = make_policy(name)
    workers = cluster(worker("p0", queued=10), worker("p1"), worker("d0"), worker("d1", resident=9))
    first = where(policy.place(need(), workers))
    later = where(policy.place(need(1020, home="d1", turns=1, d1=1000), workers))
    assert first == (("d0", "") if name == "colocated" else ("d0", "p1"))
    assert later == (("d1", "p1") if name == "disaggregated" else ("d1", ""))


def test_disaggregated_goes_back_to_the_prefiller_that_has_the_prompt():
    workers = cluster(worker("p0", queued=500), worker("p1"), worker("d0"))
    placed = make_policy("disaggregated").place(need(1020, home="d0", turns=1, d0=1000, p0=900), workers)
    assert where(placed) == ("d0", "p0")
    assert not placed.share_history


def test_ampd_compares_first_tokens_and_mispredicts_as_often_as_asked():
    busy = cluster(worker("p0"), worker("d0", queued=5000), bandwidth=1e9)
    turn = need(1020, home="d0", turns=1, d0=1000)
    assert where(Ampd().place(turn, busy)) == ("d0", "p0")
    assert Ampd().place(turn, busy).share_history
    assert where(Ampd().place(turn, cluster(worker("p0", queued=300), worker("d0"), bandwidth=1e9))) == ("d0", "")
    slow = cluster(worker("p0"), worker("d0", queued=300), bandwidth=1e3)
    assert where(Ampd().place(turn, slow)) == ("d0", ""), "the history takes longer than the queue"
    wrong = 0
    for key in range(1000):
        turn.conversation.key = key
        wrong += where(Ampd(0.1).place(turn, busy)) == ("d0", "")
    assert 70 < wrong < 130


def test_threshold_prefills_at_home_what_is_mostly_cached():
    workers = cluster(worker("p0", queued=10), worker("p1"), worker("d0"))
    rule = make_policy("threshold")
    assert where(rule.place(need(3000), workers)) == ("d0", "p1")
    assert where(rule.place(need(1000), workers)) == ("d0", "p1"), "few tokens, but all of the prompt"
    assert where(rule.place(need(5000, home="d0", turns=1, d0=3500), workers)) == ("d0", "")
    assert where(rule.place(need(9000, home="d0", turns=1, d0=6900), workers)) == ("d0", "p1"), "more than 2,048"


def test_ppd_weighs_long_appends_by_ttft_and_tpot():
    rule = make_policy("ppd")
    near, far = ([worker("p0"), worker("d0")] for _ in range(2))
    fast, slow = cluster(*near, bandwidth=1e9), cluster(*far, bandwidth=1e4)
    assert where(rule.place(need(), fast)) == ("d0", "p0")
    assert where(rule.place(need(3000, home="d0", turns=1, d0=2500), fast)) == ("d0", ""), "fewer than 512 new ones"
    long = need(3000, output=20, home="d0", turns=1, d0=1000)
    assert where(rule.place(long, fast)) == ("d0", "p0"), "2 s of prefill beside 20 tokens of 20 ms"
    assert where(rule.place(long, slow)) == ("d0", ""), "KV that travels for seconds"


def test_affinity_ends_with_its_time():
    rule, workers = make_policy("affinity"), cluster(worker("d0", resident=500), worker("d1"))
    turn = need(1020, home="d0", turns=1, d0=1000)
    assert where(rule.place(turn, workers)) == ("d0", "")
    turn.conversation.last_end = -301.0
    assert where(rule.place(turn, workers)) == ("d1", "")
    turn.conversation.active = 2
    assert where(rule.place(turn, workers)) == ("d0", ""), "another turn of the session runs there"


def test_cache_aware_routes_by_match_unless_loads_differ():
    rule = make_policy("cache-aware")
    d0, d1 = worker("d0", resident=500), worker("d1")
    even = cluster(d0, d1)
    assert where(rule.place(need(1000, d0=310), even)) == ("d0", "")
    assert where(rule.place(need(1000, d0=290), even)) == ("d1", ""), "less than 30 %: where the least is cached"
    assert where(rule.place(need(1000, home="d1", turns=1, d0=700, d1=600), even)) == ("d0", ""), "not by its home"
    assert where(rule.place(need(1000, d0=900), cluster(worker("d0", turns=63), d1))) == ("d0", "")
    d0.max_turns = 100
    for _ in range(65):
        d0.change(1, 1, 0.0)
    assert where(rule.place(need(1000, d0=900), cluster(d0, d1))) == ("d1", ""), "65 turns more than the other"


def test_observe_keeps_a_first_turn_at_an_idle_home_and_sends_it_away_from_streams():
    observe = Observe()
    assert where(observe.place(need(), cluster(worker("p0"), worker("d0")))) == ("d0", "")
    crowd = cluster(worker("p0", queued=100), worker("d0", turns=4), closed=("p0",))
    placed = observe.place(need(2000, 10), crowd)
    assert where(placed) == ("d0", "p0")
    local, remote = (next(o for o in placed.options if o.prefill_at == p and o.home == "d0") for p in ("", "p0"))
    assert local.prefill == pytest.approx(2.0, rel=0.1)
    assert local.harm - remote.harm == pytest.approx(4 * (2.0 - 4 * STEP), rel=0.15), "four streams wait for it"
    assert remote.queue == pytest.approx(0.1, rel=0.2)
    long_queue = cluster(worker("p0", queued=20_000), worker("d0", turns=4), closed=("p0",))
    assert where(observe.place(need(2000, 10), long_queue)) == ("d0", ""), "waiting there would be worse"


def test_observe_looks_at_what_is_cached():
    crowd = cluster(worker("p0"), worker("d0", turns=2), closed=("p0",))
    assert where(Observe().place(need(2000, 10), crowd)) == ("d0", "p0")
    assert where(Observe().place(need(2000, 10, d0=1984), crowd)) == ("d0", "")
    crowd = cluster(worker("d0", turns=2), worker("d1", turns=2, resident=100))
    assert where(Observe().place(need(2000, 10, d1=1984), crowd)) == ("d1", "")


def test_observe_later_turns_stay_unless_they_are_large_beside_streams():
    observe = Observe()
    crowd = cluster(worker("p0"), worker("d0", turns=4), bandwidth=1e9)
    assert where(observe.place(need(1020, 10, home="d0", turns=1, d0=1000), crowd)) == ("d0", "")
    placed = observe.place(need(3000, 10, home="d0", turns=1, d0=1000), crowd)
    assert where(placed) == ("d0", "p0")
    assert placed.share_history
    slow = cluster(worker("p0"), worker("d0", turns=1), bandwidth=3e3)
    assert where(observe.place(need(3000, 10, home="d0", turns=1, d0=1000), slow)) == ("d0", ""), "21 s of copying"


def test_observe_moves_a_conversation_whose_home_is_full_once():
    observe = Observe()
    full, roomy = worker("d0", turns=64), worker("d1")
    turn = need(1020, home="d0", turns=1, d0=1000)
    placed = observe.place(turn, cluster(full, roomy))
    assert (placed.option.home, placed.option.history_at) == ("d1", "d0")
    assert observe.place(turn, cluster(full, worker("d1", resident=950))) is None, "no better there"
    crowded = worker("d0", turns=1, resident=960)
    assert where(observe.place(turn, cluster(crowded, roomy))) == ("d1", "")
    turn.conversation.moved_at = 1
    assert where(observe.place(turn, cluster(crowded, roomy))) == ("d0", ""), "it has just moved"
    turn.conversation.active = 2
    assert observe.place(turn, cluster(full, roomy)) is None, "another turn of it runs there"


def test_a_prefiller_is_a_home_where_that_is_better_for_all():
    observe = Observe()
    assert where(observe.place(need(100, 200), cluster(worker("p0"), worker("d0")))) == ("d0", ""), (
        "as good as a decoder"
    )
    crowded = worker("d0", turns=16)
    assert where(observe.place(need(100, 200), cluster(worker("p0"), crowded))) == ("p0", "")
    # Prompts of others make its steps longer: half of its time means steps of twice the length.
    busy, d0 = worker("p0"), worker("d0", turns=1)
    assert where(observe.place(need(20, 200), cluster(busy, d0)))[0] == "p0"
    busy.prefilling.value = 0.5
    assert where(observe.place(need(20, 200), cluster(busy, d0)))[0] == "d0"
    # No prefiller prefills for another one: two might wait for each other's pages.
    placed = observe.place(need(2000, 10), cluster(worker("p0", turns=2), worker("p1", turns=2), crowded))
    assert all(not option.prefill_at for option in placed.options if option.home in ("p0", "p1"))
    turn = need(1020, 100, home="p0", turns=1, p0=1000)
    queued = cluster(worker("p0", turns=1, queued=2000), worker("d0"), bandwidth=1e9)
    assert where(observe.place(turn, queued)) == ("p0", ""), "it stays, though others' prompts wait there"
    full = cluster(worker("p0", turns=64), worker("d0"), bandwidth=1e9)
    placed = observe.place(turn, full)
    assert (placed.option.home, placed.option.history_at) == ("d0", "p0")


def test_a_newcomer_waits_rather_than_drive_out_what_is_needed():
    observe = Observe()
    asked = need(2000, 10)  # 126 pages; a tenth of the pool is kept for conversations that grow
    assert observe.place(asked, cluster(worker("d0", turns=2, resident=780))) is None
    assert where(observe.place(asked, cluster(worker("d0", turns=2, resident=750)))) == ("d0", "")
    resting = worker("d0", turns=2, resident=780)
    resting.wanted = 100.0
    assert where(observe.place(asked, cluster(resting))) == ("d0", ""), "no conversation is expected back for the rest"
    assert where(observe.place(asked, cluster(worker("d0", resident=990)))) == ("d0", ""), (
        "an idle worker takes any turn"
    )
    assert where(
        observe.place(need(2000, 10, home="d0", turns=1, d0=1900), cluster(worker("d0", turns=2, resident=780)))
    )


def test_a_newcomer_goes_where_there_is_room_and_not_where_it_would_be_cheaper():
    full, roomy = worker("d0", turns=1, resident=950), worker("d1", turns=3)
    placed = Observe().place(need(2000, 10, d0=1984), cluster(full, roomy))
    assert where(placed) == ("d1", ""), "though d0 knows its beginning"
    assert {option.home for option in placed.options} == {"d1"}
    full.wanted = 0.0
    assert where(Observe().place(need(2000, 10, d0=1984), cluster(full, roomy))) == ("d0", "")
    # A prefiller's room counts like a decoder's.
    assert where(Observe().place(need(2000, 10), cluster(worker("p0", turns=1), worker("d0", turns=1, resident=950))))[
        0
    ] == ("p0")
    everywhere = [worker(name, turns=1, resident=950) for name in ("p0", "d0", "d1")]
    assert Observe().place(need(2000, 10), cluster(*everywhere)) is None


def test_room_is_kept_for_newcomers_growth_but_a_turn_at_home_may_use_it():
    """A tenth of 1,000 pages: the newcomer of 126 pages that leaves 99 waits, the one that leaves 100 does not."""
    for left, comes in ((99, False), (100, True)):
        d0 = worker("d0", turns=1, resident=1000 - 10 - 126 - left)
        assert (Observe().place(need(2000, 10), cluster(d0)) is not None) == comes
        assert where(Observe().place(need(2000, 10, home="d0", turns=1, d0=1900), cluster(d0))) == ("d0", "")


def test_a_full_home_is_left_for_any_worker_with_room():
    full = worker("d0", turns=2, resident=960)
    turn = need(1020, home="d0", turns=1, d0=1000)
    placed = Observe().place(turn, cluster(full, worker("d1", turns=1, resident=950), worker("p0", turns=1)))
    assert where(placed) == ("p0", ""), "the prefiller has room, d1 has not"
    assert placed.option.history_at == "d0"
    left = worker("d1", turns=1, resident=950)
    left.wanted = 0.0
    placed = Observe().place(turn, cluster(full, left))
    assert where(placed) == ("d1", ""), "d1's pages are full of what is not needed again"
    assert placed.option.history_at == "d0"
    placed = Observe().place(turn, cluster(full, worker("d1", turns=1, resident=950), worker("p0", resident=950)))
    assert where(placed) == ("d0", ""), "where no worker has room it is best off at home"
    full.wanted = 0.0
    placed = Observe().place(turn, cluster(full, worker("d1"), worker("p0")))
    assert where(placed) == ("d0", ""), "the conversations that are idle there are not coming back"


@pytest.mark.parametrize("name", [name for name in POLICIES if name != "observe"])
def test_other_policies_know_neither_room_nor_newcomers_nor_pace(name):
    policy = make_policy(name)
    some = cluster(worker("p0"), worker("d0"))
    assert (policy.patience(need(), some), policy.step_stretch) == (0.0, 0.0)
    placed = policy.place(need(2000, 10), cluster(worker("p0"), worker("d0", turns=2, resident=1500)))
    assert placed.option.home == "d0", "what rests there is driven out"


def test_a_newcomer_waits_no_longer_than_it_is_worth():
    """To compute 2,000 tokens again takes 2 s and delays two streams by nearly as much: 5.8 s in all, eight times."""
    full = cluster(worker("d0", turns=2, resident=780))

    def after(seconds: float) -> Placement | None:
        asked = need(2000, 10)
        return Observe().place(Need(asked.conversation, 2000, 10, asked.pages, asked.known, 0.0, waited=seconds), full)

    assert after(40.0) is None
    assert where(after(52.0)) == ("d0", "")


def test_observe_does_not_flap():
    """Two homes that are alike: estimates that tremble by a few percent move no turn."""
    turn = need(1020, 50, home="d0", turns=1, d0=1000)
    for tremble in range(20):
        d0, d1 = worker("d0", turns=3 + tremble % 2), worker("d1", turns=3)
        d0.queued_prefill_tokens = tremble
        assert where(Observe().place(turn, cluster(worker("p0"), d0, d1))) == ("d0", "")


def test_a_link_that_was_never_used_is_taken_to_be_like_others_of_its_kind() -> None:
    workers = [worker(name) for name in ("p0", "d0", "p1", "d1")]
    for view, host in zip(workers, ("a", "a", "b", "b"), strict=True):
        view.host = host
    p0, d0, p1, d1 = workers
    seen = cluster(*workers)
    assert seen.copy_seconds(p0, d0, PAGE) == 0.0
    seen.moved(Move("t", "p0", 1, 1000, 0.1, exposed=0.01), "d1")
    assert seen.copy_seconds(p0, d0, PAGE) == pytest.approx(0.1), "the best that is known"
    seen.moved(Move("t", "p0", 1, 1000, 0.001, exposed=0.0), "d0")
    assert seen.copy_seconds(p1, d1, PAGE) == pytest.approx(0.001), "within a host"
    assert seen.copy_seconds(p1, d0, PAGE) == pytest.approx(0.1), "between hosts"
    assert (seen.exposed_seconds(p1, d1), seen.exposed_seconds(p1, d0)) == (0.0, pytest.approx(0.01))


def test_observe_prefers_the_prefiller_and_the_home_of_the_same_host() -> None:
    """A prompt beside streams goes to the prefiller near them; a conversation whose home is full to a worker near it,
    for its KV can come from there sooner."""
    workers = [worker("p0"), worker("p1"), worker("d0", turns=8), worker("d1"), worker("d2")]
    for view, host in zip(workers, "abbab", strict=True):
        view.host = host
    seen = cluster(*workers, closed=("p0", "p1", "d1", "d2"))
    seen.moved(Move("t", "p0", 1, 1000, 1e-4, history=True), "d1")
    seen.moved(Move("t", "p0", 1, 1000, 0.02, history=True), "d0")
    assert where(Observe().place(need(2000), seen)) == ("d0", "p1")
    seen.workers["d0"].reserved = 1000
    seen.open = {"d0", "d1", "d2"}
    placed = Observe().place(need(1020, home="d0", turns=2, d0=1000), seen)
    assert placed is not None
    assert (placed.option.home, placed.option.history_at) == ("d2", "d0")


@pytest.mark.parametrize("name", POLICIES)
def test_of_many_workers_the_idle_one_is_found(name: str) -> None:
    """Among 200 workers, most of which are compared only roughly."""
    busy = [worker(f"d{n}", turns=5, resident=300) for n in range(200)]
    busy[137] = worker("d137")
    few = cluster(*busy, *(worker(f"p{n}", queued=0 if n == 7 else 5000) for n in range(20)))
    placed = make_policy(name).place(need(), few)
    assert placed is not None
    assert placed.option.home == "d137"
    assert placed.option.prefill_at in ("", "p7")
