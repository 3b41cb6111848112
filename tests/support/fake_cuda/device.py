"""The stand-in's device, as a program sees it that runs on it."""

from __future__ import annotations

import ctypes
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

from tests.support.fake_cuda.log import Line, Log

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


def refused() -> int:
    """How many calls were let fail."""
    return int(_library.fake_refused())
