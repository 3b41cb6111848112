"""The energy of a run, by RAPL's counters."""

from __future__ import annotations

from pathlib import Path

import pytest

from miniserve.bench.replay.metrics import Energy


def test_energy_of_rapl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("miniserve.bench.replay.metrics._gpus", list)

    def zone(folder: str, name: str, energy: int, limit: int = 1_000_000_000) -> Path:
        (tmp_path / folder).mkdir(exist_ok=True)
        for file, content in {"name": name, "energy_uj": energy, "max_energy_range_uj": limit}.items():
            (tmp_path / folder / file).write_text(f"{content}\n")
        return tmp_path / folder

    assert Energy(tmp_path / "nothing").joules() is None
    zone("intel-rapl:0", "package-0", 5_000_000)
    zone("intel-rapl:0:0", "core", 1)
    zone("intel-rapl:0:1", "dram", 999_000_000)
    zone("intel-rapl:1", "psys", 1)
    energy = Energy(tmp_path)
    assert energy.source == "rapl"
    energy.start()
    zone("intel-rapl:0", "package-0", 7_500_000)
    zone("intel-rapl:0:0", "core", 900_000_000)
    zone("intel-rapl:0:1", "dram", 1_000_000)  # wrapped around
    zone("intel-rapl:1", "psys", 900_000_000)
    assert energy.joules() == pytest.approx(2.5 + 2.0)
    assert energy.joules() == pytest.approx(4.5)
    energy.start()
    assert energy.joules() == 0
