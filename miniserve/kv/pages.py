"""Which page is whose: reference counts, and the prefix cache over full pages.

Bookkeeping only: page numbers in, page numbers out; the bytes are in `kv/memory.py`, and the caller gives the time in
seconds on any one clock. Every page is in exactly one of three states: free (it holds nothing), cached (it holds a
known prefix that no sequence uses), held (referenced at least once). An order says which goes first (`kv/eviction.py`).
"""

from collections.abc import Callable
from typing import NamedTuple

from miniserve.cluster.messages import Keep
from miniserve.kv.eviction import ExpectedNeed
from miniserve.kv.hashing import HASH_BYTES, is_snapshot


class OutOfPages(RuntimeError):
    """More pages were asked for than are free or evictable."""


class Evicted(NamedTuple):
    """A page about to be given away: its hash, its parent's, what was said when its conversation's last turn ended."""

    page: int
    digest: bytes
    parent: bytes | None
    keep: Keep
    end: float


class PagePool:
    """Reference-counted pages with a hash-addressed prefix cache.

    A page's content is immutable once it is registered under its hash, so several sequences may hold it at once.
    Unreferenced pages are evicted as `order`, which belongs to this pool, says; `on_evict` gets each, and the time,
    while the page still holds its content. Without `caching` no page gets a name.
    """

    def __init__(
        self,
        num_pages: int,
        order: ExpectedNeed,
        *,
        caching: bool = True,
        on_evict: Callable[[Evicted, float], None] | None = None,
    ) -> None:
        self.num_pages = num_pages
        self.caching = caching
        self._order = order
        self._on_evict = on_evict
        self._refs = [0] * num_pages
        self._hash_of: list[bytes | None] = [None] * num_pages
        self._parent_of: list[bytes | None] = [None] * num_pages
        self._page_of: dict[bytes, int] = {}
        self._children: dict[bytes, int] = {}
        """How many named pages follow directly on what a hash stands for; those with none are missing."""
        self._free = list(range(num_pages - 1, -1, -1))
        self.snapshot_pages = 0
        """Named pages that hold recurrent state, not keys and values."""
        self.freed = 0
        """Pages whose last reference was dropped so far."""

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._page_of

    def page(self, digest: bytes) -> int | None:
        """The page of that name."""
        return self._page_of.get(digest)

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_cached(self) -> int:
        return len(self._order)

    @property
    def num_available(self) -> int:
        """Pages an allocation could have now."""
        return len(self._free) + len(self._order)

    @property
    def num_held(self) -> int:
        return self.num_pages - self.num_available

    def allocate(self, count: int, now: float) -> list[int]:
        """`count` pages with one reference each and undefined content, unused prefixes evicted if needed. Raises
        `OutOfPages`, and then changes nothing."""
        if count > self.num_available:
            raise OutOfPages(f"{count} pages asked for, {self.num_available} available of {self.num_pages}")
        pages = []
        for _ in range(count):
            page = self._free.pop() if self._free else self._evict(now)
            self._refs[page] = 1
            pages.append(page)
        return pages

    def match(self, hashes: list[bytes]) -> list[int]:
        """The pages of the longest cached prefix of the chain `hashes`, each with a reference more, until `release`."""
        pages = []
        for digest in hashes:
            page = self._page_of.get(digest)
            if page is None:
                break
            if self._refs[page] == 0:
                self._order.remove(page)
            self._refs[page] += 1
            pages.append(page)
        return pages

    def register(self, page: int, digest: bytes, parent: bytes | None = None) -> None:
        """Make a held, full page findable under its chain hash, unless another page has that name already; `parent` is
        the hash of the page before it."""
        assert self._refs[page] > 0, "only a held page has content worth naming"
        if self.caching and digest not in self._page_of and self._hash_of[page] is None:
            self._page_of[digest] = page
            self._hash_of[page] = digest
            self.snapshot_pages += is_snapshot(digest)
            if parent is not None:
                self._parent_of[page] = parent
                self._children[parent] = self._children.get(parent, 0) + 1

    def release(self, pages: list[int], keep: Keep, now: float) -> None:
        """Drop one reference of each page. Those without references become cached, or free if they have no name. Pages
        are given in the order of the sequence; the end of a prefix is evicted before its beginning, since a page is of
        no use without those before it. `keep` says what is known of the conversation, whose turn ends `now`."""
        cached: list[int] = []
        for page in reversed(pages):
            assert self._refs[page] > 0, f"page {page} released more often than it was taken"
            self._refs[page] -= 1
            if self._refs[page] == 0:
                self.freed += 1
                unnamed = self._hash_of[page] is None
                (self._free if unnamed else cached).append(page)
        self._order.release(cached, keep, now)

    def clear(self) -> None:
        """Forget all cached prefixes; held pages stay and keep their names."""
        self._drop([page for page in self._page_of.values() if not self._refs[page]])

    def owner(self, digest: bytes) -> str | None:
        """The conversation that released the page of that name last ("": an unknown one); None if it is not cached."""
        page = self._page_of.get(digest)
        return None if page is None else self._order.owner(page)

    def drop_snapshots(self, conversation: str, but: set[bytes]) -> None:
        """Free the cached snapshots that the conversation released last, but for those after the hashes `but`."""
        named = [(page, self._hash_of[page] or b"") for page in self._order.pages_of(conversation)]
        self._drop([page for page, name in named if is_snapshot(name) and name[:HASH_BYTES] not in but])

    def _drop(self, cached: list[int]) -> None:
        for page in cached:
            self._forget(page)
            self._free.append(page)

    def _evict(self, now: float) -> int:
        """The page that the order chooses, without its name. There must be a cached page."""
        page, keep, end = self._order.choose(now, lambda page: self._hash_of[page] in self._children)
        digest, parent = self._hash_of[page], self._parent_of[page]
        assert digest is not None
        if self._on_evict is not None:
            self._on_evict(Evicted(page, digest, parent, keep, end), now)
        self._forget(page)
        return page

    def _forget(self, page: int) -> None:
        """A cached page holds nothing any more."""
        digest, parent = self._hash_of[page], self._parent_of[page]
        assert digest is not None
        del self._page_of[digest]
        self.snapshot_pages -= is_snapshot(digest)
        self._hash_of[page] = self._parent_of[page] = None
        if parent is not None:
            self._children[parent] -= 1
            if not self._children[parent]:
                del self._children[parent]
                if parent in self._page_of:
                    self._order.childless(self._page_of[parent], page)
        self._order.remove(page)
