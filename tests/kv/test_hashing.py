"""Chain hashes: the same name only for the same tokens after the same tokens."""

from __future__ import annotations

import os
import subprocess
import sys

from hypothesis import given
from hypothesis import strategies as st

from miniserve.kv.hashing import HASH_BYTES, page_hashes, root_hash

ROOT = root_hash("layout")
TOKENS = st.lists(st.integers(0, 2), max_size=12)


@given(one=TOKENS, two=TOKENS, page_tokens=st.integers(1, 4))
def test_pages_have_the_same_name_where_all_tokens_up_to_their_end_are_the_same(
    one: list[int], two: list[int], page_tokens: int
) -> None:
    first, second = page_hashes(ROOT, one, page_tokens), page_hashes(ROOT, two, page_tokens)
    assert len(first) == len(one) // page_tokens
    for page, (a, b) in enumerate(zip(first, second, strict=False), 1):
        end = page * page_tokens
        assert (a == b) == (one[:end] == two[:end])


@given(tokens=TOKENS)
def test_no_two_pages_of_a_sequence_share_a_name(tokens: list[int]) -> None:
    found = [ROOT, *page_hashes(ROOT, tokens, 1)]
    assert len(set(found)) == len(found)
    assert all(len(digest) == HASH_BYTES for digest in found)


@given(tokens=TOKENS, page_tokens=st.integers(1, 4), data=st.data())
def test_hashing_goes_on_where_it_stopped(tokens: list[int], page_tokens: int, data: st.DataObject) -> None:
    whole = page_hashes(ROOT, tokens, page_tokens)
    known = whole[: data.draw(st.integers(0, len(whole)))]
    before = list(known)
    assert page_hashes(ROOT, tokens, page_tokens, known) == whole
    assert known == before, "the caller's list was changed"


def test_the_known_pages_are_not_hashed_again() -> None:
    known = [b"k" * HASH_BYTES]
    assert page_hashes(ROOT, [1, 2], 1, known) == [known[0], *page_hashes(known[0], [2], 1)]


def test_layout_and_salt_separate_caches() -> None:
    roots = [root_hash("ab"), root_hash("ab", "c"), root_hash("abc"), root_hash("a", "bc"), root_hash("", "abc")]
    assert len(set(roots)) == len(roots)
    assert page_hashes(roots[0], [1], 1) != page_hashes(roots[1], [1], 1)


def test_large_token_ids_are_told_apart() -> None:
    small, middle, large = (page_hashes(ROOT, [token, 0], 2) for token in (1, 1 + 2**8, 1 + 2**16))
    assert small != middle != large


def test_every_process_gives_the_same_names() -> None:
    code = "from miniserve.kv.hashing import *; print(page_hashes(root_hash('m', 's'), [7, 8, 9], 2)[0].hex())"
    env = os.environ | {"PYTHONHASHSEED": "12345"}
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True).stdout
    assert other.strip() == page_hashes(root_hash("m", "s"), [7, 8, 9], 2)[0].hex()
