"""Commands of miniserve in processes of their own, with and without a terminal."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable

PATIENCE_SECONDS = 90
"""For what takes a second on an idle machine."""
HIDDEN = (
    *("MINISERVE_API_KEY", "VLLM_API_KEY"),
    *("COLUMNS", "LINES"),  # pytest imports readline, which sets them for all processes started then: pytest-xdist's
    *("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"),
)
AT_ITS_TERMINAL = (
    "import fcntl, signal, sys, termios\n"
    "fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"  # the terminal's Ctrl-C is then a signal to this process
    "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # also where the tests run in the background
    "from miniserve.cli.main import main\n"
    "sys.exit(main())\n"
)


def environment(**more: str) -> dict[str, str]:
    """The environment without keys, and without what overrides the size or the abilities of a terminal."""
    return {name: value for name, value in os.environ.items() if name not in HIDDEN} | more


class Terminal:
    """A command of miniserve at a terminal of its own."""

    def __init__(self, *arguments: str, columns: int = 100, lines: int = 30, **more: str) -> None:
        self.controller, self.terminal = pty.openpty()
        self.resize(columns, lines)
        self.process = subprocess.Popen(
            [sys.executable, "-c", AT_ITS_TERMINAL, *arguments],
            stdin=self.terminal,
            stdout=self.terminal,
            stderr=self.terminal,
            env=environment(**{"TERM": "xterm-256color"} | more),
            start_new_session=True,
        )
        self.written = b""

    def resize(self, columns: int, lines: int) -> None:
        self.columns, self.lines = columns, lines
        fcntl.ioctl(self.terminal, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def press(self, keys: bytes) -> None:
        os.write(self.controller, keys)

    def read(self, seconds: float = 0) -> bool:
        """Take what has been written, waiting `seconds` for it; whether there was anything."""
        if not select.select([self.controller], [], [], seconds)[0]:
            return False
        self.written += os.read(self.controller, 65536)
        return True

    def ends(self) -> int:
        """Wait for the end of the process, and take all it has written; its exit code."""
        code = self.process.wait(PATIENCE_SECONDS)
        while self.read():
            pass
        return code

    def frame(self) -> list[str]:
        """The lines of the screen that is drawn last, as far as it is drawn."""
        last = self.written.decode("utf-8", "replace").split("\x1b[H")[-1]
        return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", last).split("\r\n")

    def see(self, text: str) -> list[str]:
        """Wait for a screen with `text` that fills the terminal; its lines."""

        def seen() -> bool:
            lines = self.frame()
            whole = len(lines) == self.lines and {len(line) for line in lines} == {self.columns}
            return whole and text in "\n".join(lines)

        self._read_until(seen)
        return self.frame()

    def read_until(self, text: str) -> None:
        """Wait for `text` after what has been waited for so far."""
        self._read_until(lambda: text.encode() in self.written)
        self.written = self.written.partition(text.encode())[2]

    def _read_until(self, seen: Callable[[], bool]) -> None:
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not seen():
            assert self.read(max(0.0, deadline - time.monotonic())), self.frame()

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.controller)
        os.close(self.terminal)
