"""Triton's interpreter, on a CPU, where Triton is installed."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch


@contextmanager
def interpreted(version: str | None = None) -> Iterator[pytest.MonkeyPatch]:
    """Kernels that are imported meanwhile for the first time are interpreted. Skips where Triton is missing, or older
    than `version`, and on a GPU."""
    if torch.cuda.is_available():
        pytest.skip("scripts/gpu_check.py runs the kernels themselves")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")  # read where kernels are defined, those of Triton too
        reason = "triton is not installed (it comes with torch for CUDA), or not new enough"
        pytest.importorskip("triton", version, reason)
        yield patch
