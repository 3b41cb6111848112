"""States with a table of the transitions between them: from each state, the states that may follow, and why."""

from collections.abc import Mapping
from enum import Enum
from typing import TypeVar

State = TypeVar("State", bound=Enum)
Transitions = Mapping[State, Mapping[State, str]]


class IllegalTransition(RuntimeError):
    """Something was to go where its table knows no way: a bug."""


def transitions(states: type[State], table: Mapping[str, Mapping[str, str]]) -> Transitions[State]:
    """The table of these states, of one of states.toml, which has their values."""
    return {state: {states(after): why for after, why in table[state.value].items()} for state in states}


def follow(table: Transitions[State], before: State, after: State) -> State:
    """`after`, where it may follow `before`. Raises `IllegalTransition`."""
    if after not in table[before]:
        raise IllegalTransition(f"{before.value} cannot become {after.value}")
    return after
