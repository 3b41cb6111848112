"""Sequences that have to wait for pages: they are not matched anew in each step, and never get a page that has gone."""

from __future__ import annotations

import pytest

from miniserve.kv.eviction import make_order
from miniserve.kv.pages import PagePool
from miniserve.sampling_params import SamplingParams
from miniserve.worker.engine import Engine
from miniserve.worker.sequence import Sequence, State
from miniserve.worker.step import Launched, Work
from tests.support.whole import check_pool

PAGE = 4


class Model:
    eos: frozenset[int] = frozenset()

    def launch(self, batch: list[Work]) -> Launched:
        sampled = [(1, None) for work in batch if work.samples]
        return lambda: sampled


class World:
    """An engine of 20 pages, and how often its prefix cache was asked."""

    def __init__(self) -> None:
        self.now = 0.0
        self.pool = PagePool(20, make_order("lru"))
        self.engine = Engine(
            Model(),
            self.pool,
            page_tokens=PAGE,
            max_num_batched_tokens=8,
            max_num_seqs=9,
            max_model_len=200,
            clock=lambda: self.now,
        )
        self.matched = 0
        match = self.pool.match

        def counted(hashes: list[bytes]) -> list[int]:
            self.matched += 1
            return match(hashes)

        self.pool.match = counted  # type: ignore[method-assign]

    def add(self, turn: str, tokens: list[int], outputs: int = 1) -> Sequence:
        params = SamplingParams(temperature=0, max_tokens=outputs, ignore_eos=True)
        sequence = Sequence(turn, tokens, params, 0, b"")
        self.engine.add(sequence)
        return sequence

    def rounds(self, count: int) -> int:
        """How often the prefix cache was asked in some rounds."""
        before = self.matched
        for _ in range(count):
            self.engine.admit()
            self.engine.step()
            check_pool(self.pool)
        return self.matched - before


def test_a_sequence_that_waits_for_a_prefill_is_matched_when_that_one_cannot_help_it_further() -> None:
    world = World()
    first = world.add("a", [5] * 32)
    others = [world.add(f"b{n}", [*[5] * 16, *[n] * 4]) for n in range(3)]
    assert world.rounds(1) == 4
    assert world.rounds(1) == 0, "the first one computes on"
    assert [s.state for s in others] == [State.WAITING] * 3
    assert world.rounds(1) == 3
    assert [s.cached for s in others] == [16] * 3
    world.rounds(9)
    assert first.state is State.FINISHED
    assert world.pool.num_held == 0


def test_a_sequence_that_does_not_fit_is_matched_again_when_pages_were_freed() -> None:
    world = World()
    world.add("a", [5] * 32)
    world.rounds(9)
    stream, small = world.add("s", [6] * 40, outputs=30), world.add("t", [8] * 4, outputs=12)
    world.rounds(1)
    large = world.add("l", [*[5] * 32, *[7] * 28])
    assert world.rounds(6) == 1
    assert large.state is State.WAITING
    while small.state is not State.FINISHED:
        assert world.rounds(1) == 0
    assert world.rounds(3) == 1, "it still does not fit"
    world.engine.abort(stream.turn)
    assert world.rounds(1) == 1
    assert large.state is State.RUNNING


@pytest.mark.parametrize("seconds", [0.5, 1.0])
def test_what_was_found_of_a_sequence_that_waits_is_named_as_needed_again_after_a_second(seconds: float) -> None:
    world = World()
    world.add("s", [6] * 40, outputs=30)
    world.rounds(6)
    world.add("l", [7] * 60)
    assert world.rounds(1) == 1
    world.now += seconds
    assert world.rounds(2) == (1 if seconds >= 1 else 0)


def test_pages_that_were_evicted_while_a_sequence_waited_are_computed_again() -> None:
    world = World()
    world.add("a", [5] * 32)
    world.rounds(9)
    stream = world.add("s", [6] * 40, outputs=60)
    world.rounds(6)
    large = world.add("l", [*[5] * 32, *[7] * 20])
    while world.pool.num_cached + world.pool.num_free > 6:
        world.rounds(1)
    assert large.state is State.WAITING
    world.engine.abort(stream.turn)
    world.rounds(1)
    assert large.cached is not None
    assert large.cached < 32, "some are gone"
    assert len({*large.pages}) == 13
