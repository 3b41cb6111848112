"""The energy that a run takes, by this machine's own counters."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

POWERCAP = Path("/sys/class/powercap")
ZONES = ("package", "dram")
"""Beginnings of the names of RAPL's zones that add up: `core` and `uncore` are parts of a package, `psys` is all."""

Read = Callable[[], int]


class Energy:
    """Joules of all GPUs of this machine (NVML) or, where there are none, of its processors and memory (RAPL).

    Everything that runs meanwhile counts, and what an idle machine takes too. `source` is `nvml`, `rapl`, or None where
    nothing can be read; reading RAPL usually needs root.
    """

    def __init__(self, powercap: Path = POWERCAP) -> None:
        self.source: str | None = None
        self._counters: list[tuple[Read, int, float]] = []
        """Of each one: how it is read, where it wraps around (0: never), and what its unit is in joules."""
        if gpus := _gpus():
            self.source, self._counters = "nvml", [(read, 0, 1e-3) for read in gpus]
        elif zones := _zones(powercap):
            self.source, self._counters = "rapl", [(read, limit, 1e-6) for read, limit in zones]
        self._last: list[int] = []
        self._joules = 0.0

    def start(self) -> None:
        self._joules = 0.0
        self._last = [read() for read, _, _ in self._counters]

    def joules(self) -> float | None:
        """Since `start`; None where nothing can be read. Call it every few minutes: a counter that wraps around twice
        in between looks as if it had once (RAPL's last for 5 minutes or more)."""
        for n, (read, limit, unit) in enumerate(self._counters):
            now = read()
            passed = now - self._last[n]
            if passed < 0:
                passed += limit
            self._last[n] = now
            self._joules += max(passed, 0) * unit
        return self._joules if self._counters else None


def _gpus() -> list[Read]:
    """The total energy of each GPU since its driver was loaded, in millijoules."""
    try:
        import pynvml

        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(n) for n in range(pynvml.nvmlDeviceGetCount())]
        reads: list[Read] = [lambda h=handle: pynvml.nvmlDeviceGetTotalEnergyConsumption(h) for handle in handles]  # type: ignore[misc]
        for read in reads:
            read()  # GPUs before Volta have no such counter
    except Exception:  # no package, no driver, no GPU, no counter: NVML has an exception of its own for each
        return []
    return reads


def _zones(powercap: Path) -> list[tuple[Read, int]]:
    """Microjoules of each zone, and where they wrap around."""
    zones: list[tuple[Read, int]] = []
    for folder in sorted(powercap.glob("intel-rapl:*")):  # AMD's have that name too
        try:
            if not (folder / "name").read_text().startswith(ZONES):
                continue
            limit = int((folder / "max_energy_range_uj").read_text())
            counter = folder / "energy_uj"
            int(counter.read_text())
        except (OSError, ValueError):
            continue
        zones.append((lambda counter=counter: int(counter.read_text()), limit))  # type: ignore[misc]
    return zones
