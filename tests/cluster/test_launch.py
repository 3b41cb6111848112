"""The directory of a run, and its processes."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest

from miniserve.cluster import launch
from miniserve.cluster.channels import Keys
from miniserve.cluster.launch import RunDir, WorkerProcess, WorkerSpec
from miniserve.config import EngineConfig


def test_a_link_in_place_of_the_directory_is_not_followed(tmp_path: Path) -> None:
    """Anyone may make one in /tmp, to a directory of ours in which nothing is to be swept away."""
    ours = tmp_path / "ours"
    ours.mkdir(mode=0o700)
    (ours / "kept").mkdir()
    (ours / "kept" / "lock").touch()
    (tmp_path / "base").symlink_to(ours)
    with pytest.raises(OSError, match="not a private directory"):
        RunDir(tmp_path / "base")
    assert (ours / "kept" / "lock").exists()


def test_a_process_that_the_kernel_does_not_let_go_counts_as_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "KILL_SECONDS", 0.1, raising=False)
    process = WorkerProcess(WorkerSpec("d0", 1, "", "", "", EngineConfig(model="m"), Keys("", "")))
    reap = process._try_wait
    process._try_wait = lambda flags: (0, 0) if flags else reap(flags)  # as while it sleeps in a driver
    killing = threading.Thread(target=process.kill, daemon=True)
    process.send_signal(signal.SIGSTOP)
    monkeypatch.setattr(process, "send_signal", lambda number: None)
    try:
        killing.start()
        killing.join(2)
        assert not killing.is_alive()
        assert process.ended == "ended with exit code -9"
    finally:
        os.kill(process.pid, signal.SIGKILL)
