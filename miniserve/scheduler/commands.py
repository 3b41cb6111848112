"""What the scheduler wants done. The server and the simulator carry commands out in their order."""

from typing import Any, NamedTuple

from miniserve.cluster.messages import Message, TurnOutput

Record = dict[str, Any]
"""A `Decision` or an `Outcome` of monitor/views.toml, which says what is in it: a line of the decision log."""


class Send(NamedTuple):
    worker: str
    message: Message


class Deliver(NamedTuple):
    """Give `output` to the client of `turn`."""

    turn: str
    output: TurnOutput


class Note(NamedTuple):
    """Show `record` to the observers: the decision log, and listeners of events."""

    record: Record


Command = Send | Deliver | Note
