"""What the supervisor says of workers that end, by processes that are none."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from miniserve.cluster import supervisor as module
from miniserve.cluster.launch import Launcher, StartupError, WorkerSpec
from miniserve.cluster.messages import Envelope, StartFailed
from miniserve.cluster.supervisor import Supervisor
from miniserve.config import EngineConfig
from tests.support.fake_engine import READY


class Process:
    """A worker's process that does nothing, and ends when it is told to."""

    placed = True

    def __init__(self, spec: Any) -> None:
        self.spec = spec
        self.ended: str | None = None

    def kill(self) -> None:
        self.ended = "ended with exit code -9"

    def stop(self, seconds: float) -> None:
        self.kill()


class Fake(Launcher):
    def start(self, spec: WorkerSpec, far: str) -> Process:
        return Process(spec)


@pytest.fixture
async def watched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """One worker that has served; it is started again at once when it ends."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr(module, "WATCH_SECONDS", 0.01)
    monkeypatch.setattr(module, "WATCH_START_SECONDS", 0.01)
    ignore = lambda *told: None  # noqa: E731
    made = Supervisor(
        {"d0": EngineConfig(model="m")}, 60.0, Fake(), up=ignore, down=ignore, report=ignore, loading=ignore
    )
    monkeypatch.setattr(made._health, "died", lambda name, now: 0.0)
    starting = asyncio.create_task(made.start())
    while not made.processes:
        await asyncio.sleep(0.01)
    said(made, READY)
    await starting
    yield made
    await made.stop()


def said(workers: Supervisor, body: Any) -> None:
    workers._handle(Envelope("d0", workers.processes["d0"].spec.epoch, body))


async def end(workers: Supervisor, code: int) -> None:
    """The present incarnation ends, and the next one has been started."""
    process = workers.processes["d0"]
    process.ended = f"ended with exit code {code}"
    async with asyncio.timeout(5):
        while workers.processes["d0"] is process:
            await asyncio.sleep(0.01)


async def test_the_reason_is_that_of_the_latest_end(watched: Supervisor) -> None:
    assert watched.failed == {}
    await end(watched, -11)
    assert "exit code -11" in watched.failed["d0"]
    said(watched, StartFailed("There is no room for the model."))
    await end(watched, 1)
    assert watched.failed["d0"] == "There is no room for the model.", "better than a code"
    await end(watched, 7)
    assert "exit code 7" in watched.failed["d0"], "the room was not this one's trouble"
    said(watched, READY)
    assert watched.failed == {}
    await end(watched, -9)
    assert "exit code -9" in watched.failed["d0"]


async def test_one_that_was_silent_ended_of_that(watched: Supervisor, monkeypatch: pytest.MonkeyPatch) -> None:
    silences: Iterator[dict[str, float]] = iter([{"d0": 61.0}])
    monkeypatch.setattr(watched._health, "silent", lambda now: next(silences, {}))
    process = watched.processes["d0"]
    async with asyncio.timeout(5):
        while watched.processes["d0"] is process:
            await asyncio.sleep(0.01)
    assert watched.failed["d0"] == "The worker d0 was silent for 61 s and was ended."
    await end(watched, 3)
    assert "exit code 3" in watched.failed["d0"]


async def test_a_worker_that_loads_while_all_are_stopped_is_told_so(watched: Supervisor) -> None:
    adding = asyncio.create_task(watched.add("d1", EngineConfig(model="m")))
    async with asyncio.timeout(5):
        while "d1" not in watched.processes:
            await asyncio.sleep(0.01)
        await watched.stop()
        with pytest.raises(StartupError, match="shutting down"):
            await adding


async def test_a_worker_that_takes_its_time_to_leave_does_not_disturb_the_watch(
    watched: Supervisor, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    await added(watched, "d1")
    monkeypatch.setattr(watched.processes["d1"], "stop", lambda seconds: time.sleep(0.2))
    monkeypatch.setattr(watched._health, "silent", lambda now: {})
    await watched.remove("d1")
    assert not caplog.records


async def test_a_worker_that_is_removed_as_it_ends_is_not_started_again(watched: Supervisor) -> None:
    await added(watched, "d1")
    watched.processes["d1"].ended = "ended with exit code 1"
    await asyncio.sleep(0.05)  # the watch has seen it, and waits for what it still has to say
    await watched.remove("d1")
    await asyncio.sleep(0.2)
    assert set(watched.processes) == {"d0"}
    assert not watched.failed
    await end(watched, 3)  # others are still watched


async def test_an_address_that_is_not_ours_is_what_the_start_ends_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    launcher, ignore = Fake(), lambda *told: None
    launcher.address = "192.0.2.1"
    made = Supervisor({"d0": EngineConfig(model="m")}, 60.0, launcher, up=ignore, down=ignore, report=ignore, loading=ignore)
    with pytest.raises(StartupError, match=r"192\.0\.2\.1"):
        await made.start()
    assert not list(tmp_path.glob("*/*"))


async def test_a_directory_whose_name_is_too_long_for_sockets_is_what_the_start_ends_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = tmp_path / ("x" * 100)
    deep.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(deep))
    ignore = lambda *told: None
    made = Supervisor({"d0": EngineConfig(model="m")}, 60.0, Fake(), up=ignore, down=ignore, report=ignore, loading=ignore)
    with pytest.raises(StartupError):
        await made.start()


async def added(workers: Supervisor, name: str) -> None:
    adding = asyncio.create_task(workers.add(name, EngineConfig(model="m")))
    async with asyncio.timeout(5):
        while name not in workers.processes:
            await asyncio.sleep(0.01)
        workers._handle(Envelope(name, 1, READY))
        await adding
