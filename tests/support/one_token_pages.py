"""Sequences of one-token pages through a `PagePool`, and what a test says of their conversations."""

from __future__ import annotations

from hypothesis import strategies as st

from miniserve.cluster.messages import Keep
from miniserve.kv.eviction import UNKNOWN
from miniserve.kv.hashing import page_hashes, root_hash
from miniserve.kv.pages import PagePool

KEEPS = st.builds(
    Keep,
    conversation=st.sampled_from("abcdef"),
    gap=st.sampled_from([0.0, 2.0, 30.0, 600.0]),
    chance=st.sampled_from([0.0, 0.3, 1.0]),
    page_seconds=st.sampled_from([0.0, 0.01, 0.1]),
)
SOON, LATER = Keep("soon", gap=5.0, page_seconds=0.1), Keep("later", gap=500.0, page_seconds=0.1)


class Turn:
    """A sequence that holds pages, the first `named` of which are registered. A page holds one token."""

    def __init__(self, tokens: list[int], pages: list[int], named: int) -> None:
        self.tokens = tokens
        self.pages = pages
        self.named = named


def hashes(*tokens: int) -> list[bytes]:
    return page_hashes(root_hash("tiny"), list(tokens), 1)


def cache(pool: PagePool, *tokens: int, keep: Keep = UNKNOWN, now: float = 0.0) -> list[int]:
    """Put a sequence through the pool, which caches its pages afterwards."""
    chain = hashes(*tokens)
    pages = pool.match(chain)
    pages += pool.allocate(len(tokens) - len(pages), now)
    for i, page in enumerate(pages):
        pool.register(page, chain[i], chain[i - 1] if i else None)
    pool.release(pages, keep, now)
    return pages


def cached(pool: PagePool, *tokens: int) -> int:
    """How many pages of a sequence are found; changes nothing."""
    return next((i for i, digest in enumerate(hashes(*tokens)) if digest not in pool._page_of), len(tokens))
