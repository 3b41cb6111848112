"""Some seconds of `scripts/soak.py`: real processes, random everything, workers killed. Another seed each time."""

from __future__ import annotations

import importlib.util
import logging
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


def load():
    """The script as a module."""
    path = Path(__file__).resolve().parents[2] / "scripts" / "soak.py"
    spec = importlib.util.spec_from_file_location("soak", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["soak"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def soak():
    logging.disable(logging.CRITICAL)
    yield load()
    logging.disable(logging.NOTSET)


@pytest.mark.long
def test_ten_seconds(soak):
    result = soak.soak(10.0, int(time.time()), quiet=True)
    assert result["tokens compared"] > 100


def test_the_soak_notices_wrong_text(soak, monkeypatch):
    wrong = soak.tiny.reference
    monkeypatch.setattr(
        soak.tiny, "reference", lambda folder, prompts, n: [[t ^ 1 for t in text] for text in wrong(folder, prompts, n)]
    )
    with pytest.raises(soak.Violation, match=r"--seed 5 .* was continued with"):
        soak.soak(60.0, 5, rounds=1, quiet=True)
