"""Prompt lookup: what is drafted, and how it follows what has held. That text stays the same is in test_parity.py."""

from __future__ import annotations

import random

from miniserve.worker.drafts import LONGEST_PAUSE, Drafter

ROWS, FIRST, MOST = 12, 5, 11


def test_what_followed_the_last_time() -> None:
    assert Drafter(ROWS).draft([1, 2, 3, 4, 5, 6, 7, 1, 2, 3], 99) == [4, 5, 6, 7, 1]
    assert Drafter(ROWS).draft([1, 2, 3, 4, 9, 1, 2, 3, 5, 9, 1, 2, 3], 2) == [5, 9], "the latest time, two at most"
    assert Drafter(ROWS).draft([1, 2, 3, 1, 2, 3], 99) == [1, 2, 3], "it ends where the tokens end"
    assert Drafter(ROWS).draft([7, 7, 7, 7], 99) == [7]
    for nothing in ([], [1], [1, 2, 3], [1, 2, 3, 4], [1, 2, 3, 4, 1, 2]):
        assert Drafter(ROWS).draft(nothing, 99) == []
    assert Drafter(ROWS).draft([1, 2, 3, 4, 1, 2, 3], 0) == []


def test_tokens_that_come_one_by_one_are_found() -> None:
    pick = random.Random(1)
    tokens = [pick.randrange(4) for _ in range(400)]
    whole = Drafter(ROWS)
    for end in range(1, len(tokens)):
        assert whole.draft(tokens[:end], 99) == Drafter(ROWS).draft(tokens[:end], 99)


def test_drafts_get_longer_while_they_hold() -> None:
    made, tokens = Drafter(ROWS), [*range(100), 0, 1, 2]
    assert len(made.draft(tokens, 99)) == FIRST
    made.observe(FIRST, FIRST)
    assert len(made.draft(tokens, 99)) == 2 * FIRST
    made.observe(2 * FIRST, 2 * FIRST)
    assert len(made.draft(tokens, 99)) == MOST
    made.observe(MOST, 2)
    assert len(made.draft(tokens, 99)) == 3, "and as long as was right otherwise"


def test_pauses_get_longer_while_nothing_holds() -> None:
    made, tokens = Drafter(ROWS), [*range(100), 0, 1, 2]
    pauses = []
    for _ in range(9):
        waited = 0
        while not made.draft(tokens, 99):
            waited += 1
        pauses.append(waited)
        made.observe(5, 0)
    assert pauses == [0, 1, 2, 4, 8, 16, 32, 64, LONGEST_PAUSE]
    while not made.draft(tokens, 99):
        pass
    made.observe(5, 1)
    assert len(made.draft(tokens, 99)) == 2, "one that holds ends that"
    made.observe(2, 0)
    assert not made.draft(tokens, 99)
    assert made.draft(tokens, 99)
