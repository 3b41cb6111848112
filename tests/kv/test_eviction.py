"""The order of eviction by expected need."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from miniserve.cluster.messages import Keep
from miniserve.kv.eviction import RANKING_SECONDS, UNKNOWN, ExpectedNeed, need
from miniserve.kv.pages import PagePool
from tests.support.one_token_pages import KEEPS, LATER, SOON, cache, cached, hashes
from tests.support.whole import check_pool


def test_need_is_the_chance_over_the_wait() -> None:
    keep = Keep("a", gap=100.0, chance=0.5)
    assert need(keep, 0.0) == 0.5 / 100
    assert need(keep, 60.0) == 0.5 / 40
    assert need(keep, 95.0) == 0.5 / 11, "a return is not predicted to the second"
    # A gap late: it takes as long again, and half of those that return would have been here.
    assert need(keep, 200.0) == pytest.approx((0.25 / 0.75) / 100)
    assert need(keep, 300.0) == pytest.approx((0.125 / 0.625) / 200)
    assert need(Keep("a", gap=1.0, chance=1.0), 1e9) > need(Keep("a", gap=1.0, chance=0.99), 1e9) >= 0.0
    assert need(Keep("a", gap=1.0, chance=0.0), 0.5) == 0.0


@given(
    st.lists(st.tuples(KEEPS, st.integers(1, 4), st.sampled_from([0.0, 1.0, 25.0])), min_size=1, max_size=6),
    st.sampled_from([26.0, 31.0, 700.0, 1e6]),
)
def test_conversations_go_in_the_order_of_their_worth_each_from_its_end(
    conversations: list[tuple[Keep, int, float]], now: float
) -> None:
    conversations.sort(key=lambda c: c[2])
    keeps = [
        Keep(str(i), keep.gap or 5.0, keep.chance, keep.page_seconds or 0.02)
        for i, (keep, _, _) in enumerate(conversations)
    ]
    gone: list[int] = []
    pool = PagePool(
        sum(length for _, length, _ in conversations),
        ExpectedNeed(),
        on_evict=lambda evicted, _: gone.append(evicted.page),
    )
    pages = [
        cache(pool, *[i] * length, keep=keep, now=end)
        for i, (keep, (_, length, end)) in enumerate(zip(keeps, conversations, strict=True))
    ]
    by_worth = sorted(
        range(len(keeps)), key=lambda i: need(keeps[i], now - conversations[i][2]) * keeps[i].page_seconds
    )
    for _ in range(pool.num_pages):
        pool.allocate(1, now)
    assert gone == [page for i in by_worth for page in reversed(pages[i])]


def test_a_conversation_due_soon_stays_however_long_ago_it_was_used() -> None:
    pool = PagePool(8, ExpectedNeed())
    cache(pool, 1, 1, 1, 1, keep=SOON, now=10.0)
    cache(pool, 2, 2, 2, 2, keep=LATER, now=14.0)
    pool.allocate(4, 14.5)
    assert (cached(pool, 1, 1, 1, 1), cached(pool, 2)) == (4, 0)


def test_a_conversation_that_is_late_goes() -> None:
    pool = PagePool(8, ExpectedNeed())
    cache(pool, 1, 1, 1, 1, keep=Keep("soon", gap=5.0, chance=0.9, page_seconds=0.1), now=10.0)
    cache(pool, 2, 2, 2, 2, keep=LATER, now=14.0)
    pool.allocate(4, 60.0)
    assert (cached(pool, 1), cached(pool, 2, 2, 2, 2)) == (0, 4)


@pytest.mark.parametrize(
    "dear", [Keep("a", gap=50.0, page_seconds=0.2), Keep("a", gap=50.0, chance=1.0, page_seconds=0.1)]
)
def test_what_is_likelier_needed_or_dearer_to_compute_stays(dear: Keep) -> None:
    pool = PagePool(4, ExpectedNeed())
    cache(pool, 1, 1, keep=dear, now=10.0)
    cache(pool, 2, 2, keep=Keep("b", gap=50.0, chance=0.6, page_seconds=0.1), now=10.0)
    pool.allocate(2, 11.0)
    assert (cached(pool, 1, 1), cached(pool, 2)) == (2, 0)


def test_an_unknown_cost_counts_as_the_average() -> None:
    pool = PagePool(6, ExpectedNeed())
    cache(pool, 1, 1, keep=Keep("a", gap=50.0, page_seconds=0.1), now=10.0)
    cache(pool, 2, 2, keep=Keep("b", gap=50.0), now=10.0)
    cache(pool, 3, 3, keep=Keep("c", gap=50.0, page_seconds=0.3), now=10.0)
    for left in ((0, 2, 2), (0, 0, 2)):
        pool.allocate(2, 11.0)
        assert tuple(cached(pool, i, i) for i in (1, 2, 3)) == left


def test_one_conversation_goes_all_of_it_before_the_next() -> None:
    """Half of two histories saves half of the work, but is not sooner needed than all of one."""
    pool = PagePool(8, ExpectedNeed())
    cache(pool, 1, 1, 1, 1, keep=Keep("a", gap=50.0, page_seconds=0.1), now=10.0)
    cache(pool, 2, 2, 2, 2, keep=Keep("b", gap=51.0, page_seconds=0.1), now=10.0)
    for left in (3, 2, 1, 0):
        pool.allocate(1, 11.0)
        assert (cached(pool, 1, 1, 1, 1), cached(pool, 2, 2, 2, 2)) == (4, left)


def test_a_conversation_that_has_changed_is_ranked_again() -> None:
    pool = PagePool(8, ExpectedNeed())
    cache(pool, 1, 1, 1, 1, keep=SOON, now=10.0)
    cache(pool, 2, 2, 2, 2, keep=LATER, now=10.0)
    pool.allocate(1, 11.0)
    assert cached(pool, 2, 2, 2, 2) == 3
    pool.release(pool.match(hashes(2, 2)), Keep("later", gap=1.0, page_seconds=0.1), 11.1)
    pool.allocate(1, 11.2)
    assert (cached(pool, 1, 1, 1, 1), cached(pool, 2, 2, 2)) == (3, 3)


def test_the_last_turn_counts_for_all_of_a_conversation() -> None:
    """It came back with half of its history: the other half is as likely needed, though it was not used."""
    pool = PagePool(6, ExpectedNeed())
    cache(pool, 1, 1, 1, 1, keep=Keep("a", gap=9.0, chance=0.5, page_seconds=0.1), now=10.0)
    pool.release(pool.match(hashes(1, 1)), Keep("a", gap=50.0, chance=0.5, page_seconds=0.1), 100.0)
    cache(pool, 2, 2, keep=Keep("b", gap=55.0, chance=0.5, page_seconds=0.1), now=100.0)
    pool.allocate(1, 101.0)
    assert (cached(pool, 1, 1, 1, 1), cached(pool, 2, 2)) == (4, 1)


def test_conversations_are_ranked_again_when_all_are_gone() -> None:
    pool = PagePool(4, ExpectedNeed())
    cache(pool, 1, keep=SOON, now=10.0)
    cache(pool, 2, keep=LATER, now=10.0)
    pages = pool.allocate(2, 10.0)
    for page, digest in zip(pages, (hashes(3)[0], hashes(4)[0]), strict=True):
        pool.register(page, digest)
    pool.allocate(2, 10.1)
    pool.release(pages[:1], SOON, 10.2)
    pool.release(pages[1:], LATER, 10.2)
    pool.allocate(1, 10.3)
    assert (cached(pool, 3), cached(pool, 4)) == (1, 0)


def test_conversations_are_ranked_again_after_a_while() -> None:
    pool = PagePool(8, ExpectedNeed())
    cache(pool, 1, 1, 1, 1, keep=Keep("a", gap=20.0, page_seconds=0.1), now=10.0)  # due at 30
    cache(pool, 2, 2, 2, 2, keep=Keep("b", gap=10.0, page_seconds=0.1), now=10.0)  # late since 20
    for now, left in ((24.8, (3, 4)), (24.8 + RANKING_SECONDS / 2, (2, 4)), (24.8 + RANKING_SECONDS, (2, 3))):
        pool.allocate(1, now)
        assert (cached(pool, 1, 1, 1, 1), cached(pool, 2, 2, 2, 2)) == left


def test_a_shared_beginning_goes_with_the_last_that_builds_on_it() -> None:
    """A system prompt of 2 pages: the conversation that used it last is the first to go."""
    pool = PagePool(6, ExpectedNeed())
    cache(pool, 9, 9, 1, 1, keep=SOON, now=10.0)
    cache(pool, 9, 9, 2, 2, keep=LATER, now=11.0)
    taken = pool.allocate(2, 12.0)
    assert (cached(pool, 9, 9, 1, 1), cached(pool, 9, 9, 2)) == (4, 2)
    taken += pool.allocate(1, 12.0)
    assert cached(pool, 9, 9, 1, 1) == 3, "what nothing builds on goes before what it builds on"
    taken += pool.allocate(3, 12.0)
    assert (pool.num_held, pool.num_cached) == (6, 0)
    pool.release(taken, UNKNOWN, 0.0)
    check_pool(pool)


def test_a_shared_beginning_goes_on_with_the_last_that_builds_on_it() -> None:
    """It was set aside when its conversation had gone. It is not kept for ever, nor taken for an unknown one's."""
    pool = PagePool(8, ExpectedNeed())
    cache(pool, 3, 3, 3, 3, keep=Keep("other", gap=20.0, page_seconds=0.1), now=1.0)
    cache(pool, 9, 9, 1, keep=Keep("cheap", gap=5.0, page_seconds=0.001), now=150.0)
    cache(pool, 9, 9, 2, keep=Keep("cheaper", gap=5.0, page_seconds=0.0001), now=150.0)
    for count, left in ((1, (3, 2, 4)), (1, (2, 2, 4)), (2, (0, 0, 4))):
        pool.allocate(count, 200.0)
        assert (cached(pool, 9, 9, 1), cached(pool, 9, 9, 2), cached(pool, 3, 3, 3, 3)) == left


def test_where_only_copies_build_on_a_page_it_can_go() -> None:
    """A turn has its own copy of page 1 and has named page 2: the other page 1 is not worth keeping for that."""
    pool = PagePool(3, ExpectedNeed())
    one, two = pool.allocate(1, 0.0), pool.allocate(2, 0.0)
    pool.register(one[0], hashes(1)[0])
    pool.register(two[0], hashes(1)[0])
    pool.register(two[1], hashes(1, 2)[1], hashes(1)[0])
    pool.release(one, SOON, 1.0)
    assert pool.num_available == 1
    assert pool.allocate(1, 2.0) == one
    check_pool(pool)
    pool.release(two, SOON, 2.0)
    assert (pool.num_cached, pool.num_free) == (1, 1)
    check_pool(pool)


def test_unknown_conversations_go_by_use_among_the_known() -> None:
    """Those used just now stay, as if they were due; those used long ago go, one turn at a time."""
    pool = PagePool(8, ExpectedNeed())
    cache(pool, 1, 1, now=10.0)
    cache(pool, 2, 2, keep=Keep("", gap=5.0), now=500.0)
    cache(pool, 3, 3, 3, 3, keep=Keep("a", gap=100.0, page_seconds=0.1), now=500.0)
    pool.allocate(2, 501.0)
    assert (cached(pool, 1), cached(pool, 2, 2), cached(pool, 3, 3, 3, 3)) == (0, 2, 4)
    pool.allocate(2, 501.0)
    assert (cached(pool, 2, 2), cached(pool, 3, 3, 3, 3)) == (2, 2)


def test_conversations_without_a_chance_do_not_count_in_the_average() -> None:
    pool = PagePool(6, ExpectedNeed())
    cache(pool, 1, 1, keep=Keep("over", gap=1e6, chance=0.0, page_seconds=0.1), now=500.0)
    cache(pool, 2, 2, keep=Keep("a", gap=100.0, page_seconds=0.1), now=500.0)
    cache(pool, 3, 3, now=500.0)
    for left in ((0, 2, 2), (0, 0, 2)):
        pool.allocate(2, 501.0)
        assert tuple(cached(pool, i, i) for i in (1, 2, 3)) == left


def test_a_conversation_without_a_gap_is_unknown() -> None:
    pool = PagePool(4, ExpectedNeed())
    cache(pool, 1, 1, keep=Keep("a", page_seconds=9.0), now=10.0)
    cache(pool, 2, 2, keep=Keep("b", page_seconds=0.1), now=11.0)
    pool.allocate(2, 12.0)
    assert (cached(pool, 1), cached(pool, 2, 2)) == (0, 2)
