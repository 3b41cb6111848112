"""What the scheduler wants done. The server and the simulator carry commands out in their order."""

from dataclasses import dataclass

from miniserve.cluster.messages import Message, TurnOutput
from miniserve.scheduler.records import Record


@dataclass(frozen=True)
class Send:
    worker: str
    message: Message


@dataclass(frozen=True)
class Deliver:
    """Give `output` to the client of `turn`."""

    turn: str
    output: TurnOutput


@dataclass(frozen=True)
class Note:
    """Show `record` to the observers: the decision log, and listeners of events."""

    record: Record


Command = Send | Deliver | Note
