"""The page pool against a plain model of it: no leak, no double use, evictions in the right order."""

from __future__ import annotations

import copy

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from miniserve.cluster.messages import Keep
from miniserve.kv.eviction import UNKNOWN, ExpectedNeed
from miniserve.kv.hashing import snapshot_names
from miniserve.kv.pages import OutOfPages, PagePool
from tests.support.one_token_pages import KEEPS, LATER, SOON, Turn, cache, cached, hashes
from tests.support.whole import check_pool

PICK = st.integers(0, 1000)


class Pool(RuleBasedStateMachine):
    """Turns come, register their pages one by one, and go. `memory` is what the pages hold: every token up to their
    end, written by the turn that got them. Pages of unknown conversations go in the order of their use, and with `lru`
    all pages do, whatever is known of them."""

    @initialize(num_pages=st.integers(1, 10), caching=st.booleans(), lru=st.booleans())
    def make(self, num_pages: int, caching: bool, lru: bool) -> None:
        self.order = ExpectedNeed(lru)
        self.pool = PagePool(num_pages, self.order, caching=caching)
        self.lru = lru
        self.memory: list[tuple[int, ...] | None] = [None] * num_pages
        self.refs = [0] * num_pages
        self.named: dict[bytes, int] = {}
        self.unused: list[int] = []  # named pages that no turn holds, the next to be evicted first
        self.turns: list[Turn] = []

    # --- what a worker does ---

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=7))
    def start(self, tokens: list[int]) -> None:
        chain = hashes(*tokens)
        pages = self.pool.match(chain)
        known = [self.named.get(digest) for digest in chain] + [None]
        assert pages == known[: known.index(None)], "not the longest cached prefix"
        for end, page in enumerate(pages, 1):
            assert self.memory[page] == tuple(tokens[:end]), "a page that holds something else"
            self.refs[page] += 1
            if page in self.unused:
                self.unused.remove(page)
        found = len(pages)
        try:
            pages += self.allocate(len(tokens) - found)
        except OutOfPages:
            self.release(pages)
            return
        for end in range(found, len(tokens)):
            self.memory[pages[end]] = tuple(tokens[: end + 1])
        self.turns.append(Turn(tokens, pages, found))

    @precondition(lambda self: self.turns)
    @rule(pick=PICK)
    def register(self, pick: int) -> None:
        turn = self.turns[pick % len(self.turns)]
        if turn.named < len(turn.pages):
            chain = hashes(*turn.tokens)
            page, digest = turn.pages[turn.named], chain[turn.named]
            self.pool.register(page, digest, chain[turn.named - 1] if turn.named and self.lru else None)
            if self.pool.caching:
                self.named.setdefault(digest, page)
            turn.named += 1

    @precondition(lambda self: self.turns)
    @rule(pick=PICK, keep=KEEPS)
    def end(self, pick: int, keep: Keep) -> None:
        self.release(self.turns.pop(pick % len(self.turns)).pages, keep if self.lru else UNKNOWN)

    @rule(more=st.integers(1, 3))
    def ask_for_too_many(self, more: int) -> None:
        before = copy.deepcopy(self.state())
        with pytest.raises(OutOfPages):
            self.pool.allocate(self.pool.num_available + more, 0.0)
        assert self.state() == before

    @rule()
    def clear(self) -> None:
        self.pool.clear()
        self.named = {digest: page for digest, page in self.named.items() if self.refs[page]}
        self.unused = []

    # --- the same in the model ---

    def allocate(self, count: int) -> list[int]:
        free = self.refs.count(0) - len(self.unused)
        pages = self.pool.allocate(count, 0.0)
        assert len(set(pages)) == count
        assert not any(self.refs[page] for page in pages), "a page that a turn holds was given away"
        evicted = self.unused[: max(0, count - free)]
        assert {page for page in pages if page in self.unused} == set(evicted), "not the oldest, or not needed"
        self.unused = self.unused[len(evicted) :]
        self.named = {digest: page for digest, page in self.named.items() if page not in evicted}
        for page in pages:
            self.refs[page] = 1
            self.memory[page] = None
        return pages

    def release(self, pages: list[int], keep: Keep = UNKNOWN) -> None:
        self.pool.release(pages, keep, 0.0)
        for page in reversed(pages):
            self.refs[page] -= 1
            if not self.refs[page] and page in self.named.values():
                self.unused.append(page)

    def state(self) -> list[dict]:
        return [{name: value for name, value in vars(self.pool).items() if name != "_order"}, vars(self.order)]

    # --- what always holds ---

    @invariant()
    def nothing_is_lost(self) -> None:
        check_pool(self.pool)
        held = len(self.refs) - self.refs.count(0)
        assert self.pool.num_held == held
        assert self.pool.num_cached == len(self.unused)
        assert self.pool.num_free == len(self.refs) - held - len(self.unused)
        assert self.pool.num_available == self.pool.num_free + self.pool.num_cached

    @invariant()
    def every_turn_has_its_own_content(self) -> None:
        for turn in self.turns:
            for end, page in enumerate(turn.pages, 1):
                assert self.memory[page] == tuple(turn.tokens[:end])

    def teardown(self) -> None:
        if hasattr(self, "pool"):
            for turn in self.turns:
                self.release(turn.pages)
            self.turns = []
            self.nothing_is_lost()
            assert self.pool.num_held == 0


TestPool = Pool.TestCase
TestPool.settings = settings(max_examples=150, stateful_step_count=40)


# --- by hand ----------------------------------------------------------------------------------------------------------


def test_the_end_of_a_prefix_goes_before_its_beginning() -> None:
    pool = PagePool(3, ExpectedNeed())
    cache(pool, 1, 2, 3)
    pool.release(pool.allocate(1, 0.0), UNKNOWN, 0.0)
    kept = pool.match(hashes(1, 2, 3))
    assert len(kept) == 2


def test_the_least_recently_used_prefix_goes_first_and_a_match_is_a_use() -> None:
    pool = PagePool(2, ExpectedNeed())
    old, new = cache(pool, 1), cache(pool, 2)
    pool.release(pool.match(hashes(1)), UNKNOWN, 0.0)
    assert pool.allocate(1, 0.0) == new
    assert pool.match(hashes(1)) == old


def test_free_pages_are_taken_before_cached_ones() -> None:
    pool = PagePool(4, ExpectedNeed())
    cache(pool, 1, 2)
    pool.allocate(2, 0.0)
    assert len(pool.match(hashes(1, 2))) == 2


def test_of_two_pages_with_the_same_content_the_first_stays_findable() -> None:
    pool = PagePool(2, ExpectedNeed())
    one, two = pool.allocate(1, 0.0), pool.allocate(1, 0.0)
    pool.register(one[0], hashes(1)[0])
    pool.register(two[0], hashes(1)[0])
    pool.release(two, UNKNOWN, 0.0)
    assert (pool.num_free, pool.num_cached) == (1, 0)
    assert pool.match(hashes(1)) == one


def test_a_page_keeps_its_first_name() -> None:
    pool = PagePool(1, ExpectedNeed())
    pages = pool.allocate(1, 0.0)
    pool.register(pages[0], hashes(1)[0])
    pool.register(pages[0], hashes(2)[0])
    assert pool.match(hashes(2)) == []


def test_without_caching_released_pages_are_free() -> None:
    pool = PagePool(2, ExpectedNeed(), caching=False)
    cache(pool, 1, 2)
    assert (pool.num_free, pool.num_cached) == (2, 0)
    assert pool.match(hashes(1, 2)) == []


def test_nothing_is_matched_behind_a_gap() -> None:
    """Two turns computed the same pages at once, and each has the name of one: the first page may go alone."""
    pool = PagePool(4, ExpectedNeed())
    one, two = pool.allocate(2, 0.0), pool.allocate(2, 0.0)
    pool.register(one[0], hashes(1)[0])
    pool.register(two[1], hashes(1, 2)[1])
    pool.release(one, UNKNOWN, 0.0)
    pool.release(two, UNKNOWN, 0.0)
    pool.allocate(3, 0.0)  # two free pages and the oldest cached one
    assert pool.num_cached == 1
    assert pool.match(hashes(1, 2)) == []


@pytest.mark.parametrize(("order", "kept"), [(ExpectedNeed(), 1), (ExpectedNeed(lru=True), 0)])
def test_what_builds_on_a_page_protects_it_but_not_from_lru(order: ExpectedNeed, kept: int) -> None:
    """As above, but the pool knows what comes before what."""
    pool = PagePool(4, order)
    one, two = pool.allocate(2, 0.0), pool.allocate(2, 0.0)
    pool.register(one[0], hashes(1)[0])
    pool.register(two[1], hashes(1, 2)[1], hashes(1)[0])
    pool.release(one, UNKNOWN, 0.0)
    pool.release(two, UNKNOWN, 0.0)
    pool.allocate(3, 0.0)
    assert len(pool.match(hashes(1, 2))) == kept


def test_a_page_whose_snapshot_was_dropped_goes_in_its_turn() -> None:
    """It was set aside, since something built on it that was needed sooner, and that was evicted by nobody."""
    pool = PagePool(4, ExpectedNeed())
    cache(pool, 1, keep=LATER)
    (base,) = hashes(1)
    snapshot = pool.allocate(1, 0.0)
    pool.register(snapshot[0], *snapshot_names(base, 1), base)
    pool.release(snapshot, SOON, 0.0)
    cache(pool, 2, keep=Keep("between", gap=50.0, page_seconds=0.1))
    cache(pool, 3, keep=Keep("as soon", gap=5.0, page_seconds=0.1))
    pool.allocate(1, 0.0)
    assert [cached(pool, token) for token in (1, 2, 3)] == [1, 0, 1], "the first one is set aside"
    pool.drop_snapshots("soon", set())
    pool.allocate(2, 0.0)
    assert [cached(pool, token) for token in (1, 3)] == [0, 1]
    check_pool(pool)


def test_misuse_is_noticed() -> None:
    pool = PagePool(2, ExpectedNeed())
    pages = pool.allocate(1, 0.0)
    pool.release(pages, UNKNOWN, 0.0)
    with pytest.raises(AssertionError, match="more often"):
        pool.release(pages, UNKNOWN, 0.0)
    with pytest.raises(AssertionError, match="held"):
        pool.register(pages[0], hashes(1)[0])


def test_what_there_is_and_what_was_asked_for_is_in_the_error() -> None:
    pool = PagePool(4, ExpectedNeed())
    pool.allocate(1, 0.0)
    with pytest.raises(OutOfPages, match="5 pages asked for, 3 available of 4"):
        pool.allocate(5, 0.0)
