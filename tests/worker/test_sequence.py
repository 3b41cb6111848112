"""A sequence's states: it follows the table, and nothing else."""

from __future__ import annotations

from itertools import product

import pytest

from miniserve.sampling_params import SamplingParams
from miniserve.states import IllegalTransition
from miniserve.worker.sequence import TRANSITIONS, Sequence, State


@pytest.mark.parametrize(("before", "after"), product(State, State))
def test_a_sequence_moves_as_the_table_says(before: State, after: State) -> None:
    sequence = Sequence("t", [1, 2, 3], SamplingParams(), 0, b"")
    sequence.state = before
    if after in TRANSITIONS[before]:
        sequence.move(after)
        assert sequence.state is after
    else:
        with pytest.raises(IllegalTransition, match=f"{before.value} cannot become {after.value}"):
            sequence.move(after)
        assert sequence.state is before


def test_every_state_is_reached_and_every_one_ends() -> None:
    reached, ends = {State.WAITING}, {State.FINISHED}
    for _ in State:
        reached |= {after for before in reached for after in TRANSITIONS[before]}
        ends |= {before for before in State if ends & TRANSITIONS[before].keys()}
    assert reached == ends == set(State)
    assert not TRANSITIONS[State.FINISHED]
