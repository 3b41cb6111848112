"""Why no other process can map memory, in words; without a GPU."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from miniserve.kv.ipc import refusal


def test_a_process_that_hangs_is_named_without_the_handle(monkeypatch: pytest.MonkeyPatch) -> None:
    """The banner shows the reason."""

    def hangs(command: list[str], **how: Any) -> None:
        raise subprocess.TimeoutExpired(command, how["timeout"])

    monkeypatch.setattr(Path, "read_text", lambda path: "7f00-7f01 r--p 0 0:1 1 /opt/libcudart.so.13\n")
    monkeypatch.setattr(subprocess, "run", hangs)
    assert refusal(0, b"\x01c" + bytes(64)) == "another process had not opened it after 10 s"
    assert refusal(0, b"\x01e" + bytes(64)) == "", "not plain memory: this cannot be tried out"
