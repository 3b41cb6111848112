"""The energy that a run takes, by this machine's own counters."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

POWERCAP = Path("/sys/class/powercap")
ZONES = ("package", "dram")
"""Beginnings of the names of RAPL's zones that add up: `core` and `uncore` are parts of a package, `psys` is all."""

Counter = tuple[Callable[[], int | str], int, float]
"""How it is read, where it wraps around (0: never), and its unit in joules."""


class Energy:
    """Joules of all GPUs of this machine (NVML) or, where there are none, of its processors and memory (RAPL).

    Everything that runs meanwhile counts, and what an idle machine takes too. `source` is `nvml`, `rapl`, or None where
    nothing can be read; reading RAPL usually needs root.
    """

    def __init__(self, powercap: Path = POWERCAP) -> None:
        gpus = _gpus()
        self._counters = gpus or _zones(powercap)
        self.source = "nvml" if gpus else "rapl" if self._counters else None
        self._last: list[int] = []
        self._joules = 0.0

    def start(self) -> None:
        self._joules = 0.0
        self._last = [int(read()) for read, _, _ in self._counters]

    def joules(self) -> float | None:
        """Since `start`; None where nothing can be read. Call it every few minutes: a counter that wraps around twice
        in between looks as if it had once (RAPL's last for 5 minutes or more)."""
        for n, (read, limit, unit) in enumerate(self._counters):
            now = int(read())
            passed = now - self._last[n]
            self._joules += max(passed if passed >= 0 else passed + limit, 0) * unit
            self._last[n] = now
        return self._joules if self._counters else None


def _gpus() -> list[Counter]:
    """The total energy of each GPU since its driver was loaded."""
    try:
        import pynvml

        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(n) for n in range(pynvml.nvmlDeviceGetCount())]
        reads = [partial(pynvml.nvmlDeviceGetTotalEnergyConsumption, handle) for handle in handles]
        for read in reads:
            read()  # GPUs before Volta have no such counter
    except Exception:  # no package, no driver, no GPU, no counter: NVML has an exception of its own for each
        return []
    return [(read, 0, 1e-3) for read in reads]


def _zones(powercap: Path) -> list[Counter]:
    zones: list[Counter] = []
    for folder in sorted(powercap.glob("intel-rapl:*")):  # AMD's have that name too
        try:
            if not (folder / "name").read_text().startswith(ZONES):
                continue
            limit = int((folder / "max_energy_range_uj").read_text())
            read = (folder / "energy_uj").read_text
            int(read())
        except (OSError, ValueError):
            continue
        zones.append((read, limit, 1e-6))
    return zones
