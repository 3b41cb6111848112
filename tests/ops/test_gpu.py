"""What a single GPU must get right: the checks of scripts/gpu_check.py that need no yardstick, one test each.

`pytest -m gpu` runs them. The same code runs at toy size on a CPU here, so that it is known to work before a GPU is at
hand; what it finds there says nothing of a GPU.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from scripts.gpu.checks import STAGES, Check, Kind
from scripts.gpu.setting import Setting

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA GPU")
CORRECTNESS = [check for stage in STAGES for check in stage.checks if check.kind is Kind.CORRECTNESS]
HERE = (
    "kernels fresh",
    "kernels mixed",
    "kernels windows",
    "kernels experts",
    "kernels state",
    "kernels between",
    "kernels products",
    "kernels layers",
    "parity qwen3 fp32",
    "sampling",
    "ipc",
)
"""Quick ones, each of another file or kind."""


def judge(check: Check, run: Setting) -> None:
    figures = list(check.run(run))
    assert figures
    wrong = [f"{f.name}: {f.value} {f.unit}, not {f.rule} {f.limit}" for f in figures if not f.ok]
    assert not wrong, "\n".join(wrong)


@pytest.fixture(scope="module")
def on_gpu(tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return Setting("cuda", False, tmp_path_factory.mktemp("gpu"))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("check", CORRECTNESS, ids=lambda check: check.name.replace(" ", "-"))
def test_on_a_gpu(on_gpu: Setting, check: Check) -> None:
    judge(check, on_gpu)
    on_gpu.release()


@pytest.mark.parametrize("check", [c for c in CORRECTNESS if c.name in HERE], ids=lambda c: c.name.replace(" ", "-"))
def test_the_checks_themselves(tmp_path: Path, check: Check) -> None:
    judge(check, Setting("cpu", True, tmp_path))
