"""The stand-in's device, as a program sees it that runs on it."""

from __future__ import annotations

import ctypes
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
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


_library = ctypes.CDLL(None)
_library.fake_note.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
_library.fake_fail.argtypes = [ctypes.c_char_p, ctypes.c_long, ctypes.c_long]


@contextmanager
def logged() -> Iterator[Log]:
    """Writes down what happens meanwhile."""
    log = Log()
    _library.fake_log(1)
    yield log
    handle, path = tempfile.mkstemp()
    _library.fake_dump(path.encode())
    _library.fake_log(0)
    with os.fdopen(handle) as file:
        log.lines = [Line.read(line) for line in file]
    os.unlink(path)


def note(stream: int, what: str) -> None:
    """Give a stream, by its CUDA handle, an operation that does nothing and is written down."""
    _library.fake_note(stream, what.encode())


def let_fail(what: str, after: int, times: int) -> None:
    """From now on let calls of a kind fail after so many more: "alloc", "host" (pinned memory), "launch" or "ipc"."""
    _library.fake_fail(what.encode(), after, times)
