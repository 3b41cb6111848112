"""Which page is whose: reference counts, the prefix cache over full pages, and what to evict.

Bookkeeping only: page numbers in, page numbers out; the bytes are in `kv/memory.py`. Every page is in exactly one of
three states: free (holds nothing), cached (holds a known prefix, nobody uses it), held (referenced at least once).
"""

from __future__ import annotations

from collections import OrderedDict


class OutOfPages(RuntimeError):
    """More pages were asked for than are free or evictable."""


class PagePool:
    """Reference-counted pages with a hash-addressed prefix cache and LRU eviction of unreferenced pages.

    A page's content is immutable once it is registered under its hash, so several sequences may hold it at once.
    """

    def __init__(self, num_pages: int, *, caching: bool = True) -> None:
        self.num_pages = num_pages
        self.caching = caching
        self._refs = [0] * num_pages
        self._hash_of: list[bytes | None] = [None] * num_pages
        self._page_of: dict[bytes, int] = {}
        self._free = list(range(num_pages - 1, -1, -1))
        # Unreferenced pages that still hold a prefix, least recently used first.
        self._cached: OrderedDict[int, None] = OrderedDict()

    @property
    def num_free(self) -> int:
        """Pages that hold nothing."""
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Pages that hold a prefix nobody is using: the next allocation may take them."""
        return len(self._cached)

    @property
    def num_available(self) -> int:
        """Pages an allocation could have now."""
        return len(self._free) + len(self._cached)

    @property
    def num_held(self) -> int:
        """Pages referenced at least once."""
        return self.num_pages - self.num_available

    def allocate(self, count: int) -> list[int]:
        """`count` pages with one reference each and undefined content, the oldest unused prefixes evicted if needed.

        Raises `OutOfPages`, and then changes nothing.
        """
        if count > self.num_available:
            raise OutOfPages(f"{count} pages asked for, {self.num_available} available of {self.num_pages}")
        pages = []
        for _ in range(count):
            if self._free:
                page = self._free.pop()
            else:
                page, _ = self._cached.popitem(last=False)
                self._forget(page)
            self._refs[page] = 1
            pages.append(page)
        return pages

    def match(self, hashes: list[bytes]) -> list[int]:
        """The pages of the longest cached prefix of the chain `hashes`, each with a reference more.

        Give them back with `release`.
        """
        pages = []
        for digest in hashes:
            page = self._page_of.get(digest)
            if page is None:
                break
            pages.append(page)
        for page in pages:
            if self._refs[page] == 0:
                del self._cached[page]
            self._refs[page] += 1
        return pages

    def register(self, page: int, digest: bytes) -> None:
        """Make a held, full page findable under its chain hash. Where another page has that name already, it stays."""
        assert self._refs[page] > 0, "only a held page has content worth naming"
        if self.caching and digest not in self._page_of and self._hash_of[page] is None:
            self._page_of[digest] = page
            self._hash_of[page] = digest

    def release(self, pages: list[int]) -> None:
        """Drop one reference of each page. Those nobody holds any more become cached, or free if they have no name.

        Pages are given in the order of the sequence; the end of a prefix is evicted before its beginning, since a
        page is of no use without those before it.
        """
        for page in reversed(pages):
            assert self._refs[page] > 0, f"page {page} released more often than it was taken"
            self._refs[page] -= 1
            if self._refs[page] == 0:
                if self._hash_of[page] is None:
                    self._free.append(page)
                else:
                    self._cached[page] = None

    def clear(self) -> None:
        """Forget all cached prefixes; held pages stay and keep their names."""
        for page in self._cached:
            self._forget(page)
            self._free.append(page)
        self._cached.clear()

    def check(self) -> None:
        """Raise AssertionError if a page is lost, doubled or miscounted (for tests; linear in the pool)."""
        assert len(set(self._free)) == len(self._free)
        assert not set(self._free) & set(self._cached)
        for page in range(self.num_pages):
            unused = page in self._cached or page in set(self._free)
            assert (self._refs[page] == 0) == unused, f"page {page} has {self._refs[page]} references"
        assert self.num_free + self.num_cached + self.num_held == self.num_pages
        assert all(self._hash_of[page] == digest for digest, page in self._page_of.items())

    def _forget(self, page: int) -> None:
        digest = self._hash_of[page]
        assert digest is not None
        del self._page_of[digest]
        self._hash_of[page] = None
