"""What the device can do at best, measured in the same run by plain torch."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from scripts.gpu.common import seconds
from scripts.gpu.setting import Figure, Figures, Setting


@dataclass(frozen=True)
class Ceilings:
    """Bytes a second of a copy (read and written ones), of reading alone, and bf16 operations a second."""

    copy: float
    read: float
    matmul: float

    @property
    def bandwidth(self) -> float:
        """The roof of what only reads: whichever way of measuring it gives more."""
        return max(self.copy, self.read)


def measured(run: Setting) -> Ceilings:
    """Measured once a process."""
    return run.keep("ceilings", lambda: _measure(run))


def _measure(run: Setting) -> Ceilings:
    copy, read = _memory(run)
    n = 256 if run.small else 8192
    left, right = (torch.randn(n, n, device=run.device).to(torch.bfloat16) for _ in range(2))
    # Ten in a row: the device is then as warm as in a prefill, and the host's part does not count.
    matmul = 10 * 2 * n**3 / seconds(lambda: [left @ right for _ in range(10)], run, 5)
    run.release()
    return Ceilings(copy, read, matmul)


def _memory(run: Setting) -> tuple[float, float]:
    size = 2**24 if run.small else 2**32
    source = torch.ones(size // 4, dtype=torch.float32, device=run.device)
    target = torch.empty_like(source)
    return 2 * size / seconds(lambda: target.copy_(source), run, 9), size / seconds(lambda: source.sum(), run, 9)


def check(run: Setting) -> Figures:
    """The ceilings that all shares of this run are of."""
    found = measured(run)
    yield Figure("device copy, bytes read and written", found.copy / 1e9, "GB/s")
    yield Figure("device read (a sum)", found.read / 1e9, "GB/s")
    yield Figure("bf16 matmul", found.matmul / 1e12, "TFLOP/s")
