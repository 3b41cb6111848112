"""scripts/profile_hardware.py: the fit, and a profile of this machine that the simulator takes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest

from miniserve.bench.replay.metrics import TurnTimes
from miniserve.bench.replay.server import TargetServer
from miniserve.bench.simulate.hardware import load_hardware
from miniserve.bench.simulate.run import simulate
from miniserve.config import ConfigError, EngineConfig
from scripts import profile_hardware
from scripts.profile_hardware import COSTS, Measured, fit, quality
from tests.support.simulated import PLAIN, scripts, simulated

pytestmark = pytest.mark.slow


def test_a_fit_finds_the_constants_again():
    true = msgspec.structs.replace(PLAIN, chunk_overhead=0.003, per_pair=1e-6, per_sequence=0.002, per_kv_token=1e-5)
    shapes = [(n, c, 0, 0) for n in (16, 64, 256) for c in (0, 500, 2000)]
    shapes += [(0, 0, b, s) for b in (1, 4, 16) for s in (100, 4000)] + [(64, 500, 4, 1000)]
    steps = [(n, c, b, s, true.step_seconds([(n, c)] if n else [], b, s)) for n, c, b, s in shapes]
    device = msgspec.structs.replace(PLAIN, overhead=0.002, **dict.fromkeys(COSTS, 0.0))
    found = [Measured(device, steps)] * 2
    fitted = fit(found, "mine")
    for name in ("base", "chunk_overhead", "per_token", "per_pair", "per_sequence", "per_kv_token"):
        assert getattr(fitted, name) == pytest.approx(getattr(true, name), rel=1e-6), name
    assert fitted.per_context == pytest.approx(0, abs=1e-9)
    assert fitted.overhead == 0.002
    assert quality(fitted, found) == "32 steps; the profile is off by 0% (median), 0% (p95)"
    down = [(n, c, b, s, 1.0 - n / 1000) for n, c, b, s, _ in steps]
    assert fit([Measured(device, down)], "x").per_token == 0.0


def test_a_turn_that_fails_is_no_measurement(monkeypatch: pytest.MonkeyPatch):
    """How long it took to fail says nothing of messages."""

    @asynccontextmanager
    async def running(*of: object) -> AsyncIterator[TargetServer]:
        yield TargetServer(root="http://here", kind="miniserve", model="m")

    async def ask(*of: object) -> TurnTimes:
        return TurnTimes(0.0, 60.0, 60.0, 8, None, 0, "HTTP 500: the engine is gone")

    monkeypatch.setattr(profile_hardware, "running", running)
    monkeypatch.setattr(profile_hardware, "ask", ask)
    with pytest.raises(ConfigError, match="failed at one: HTTP 500: the engine is gone"):
        asyncio.run(profile_hardware.message_seconds(EngineConfig(model="m")))


@pytest.mark.long
def test_a_profile_of_this_machine(tiny_folder: Path, tmp_path: Path, capfd):
    """Two copies at once, of a tiny model; the simulator takes what it writes."""
    path = tmp_path / "here.json"
    assert profile_hardware.main([str(tiny_folder), "--workers", "2", "--threads", "1", "--out", str(path)]) == 0
    assert "steps; the profile is off by" in capfd.readouterr().err
    here = load_hardware(str(path))
    assert here.base > 0
    assert here.overhead > 0
    assert 0 < here.message_seconds < 1
    assert 1e-6 < here.step_seconds([(64, 0)], 0, 0) < 1.0
    result = simulate(simulated(scripts(3, first=100), "1P1D", "observe", hardware=here))
    assert result["errors"] == 0
    assert profile_hardware.main([str(tmp_path / "nothing"), "--out", str(path)]) == 1
    assert "nothing" in capfd.readouterr().err
