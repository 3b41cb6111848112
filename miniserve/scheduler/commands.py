"""What the scheduler wants done. The server and the simulator carry commands out in their order."""

from typing import NamedTuple

from miniserve.cluster.messages import Message, TurnOutput
from miniserve.scheduler.records import Record


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
