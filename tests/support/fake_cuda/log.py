"""What the stand-in writes down of a program."""

from __future__ import annotations

from dataclasses import dataclass, field

Clock = dict[int, int]
"""How many operations of each stream come before."""


@dataclass(frozen=True)
class Line:
    """What reached the device or what the host did. `kind` is L for operation `number` of a stream, C for a node of the
    graph that is recorded on it, S for a wait of the host and M for memory that it took or gave back. `clock` says what
    comes before it, or is done by then."""

    kind: str
    stream: int
    number: int
    clock: Clock
    what: str

    @classmethod
    def read(cls, line: str) -> Line:
        kind, stream, number, clock, what = line.rstrip("\n").split("\t")
        pairs = (part.split(":") for part in clock.split(",") if part)
        return cls(kind, int(stream), int(number), {int(of): int(count) for of, count in pairs}, what)


@dataclass
class Log:
    """Lines in the order in which they came, once the log has ended."""

    lines: list[Line] = field(default_factory=list)

    def of(self, kind: str) -> list[Line]:
        """Those of one kind."""
        return [line for line in self.lines if line.kind == kind]
