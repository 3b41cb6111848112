"""The tiny tokenizer, and what transformers makes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from miniserve.text.tokenizer import Tokenizer
from tests.support import tiny


@pytest.fixture(scope="module")
def tokenizer(tiny_folder: Path) -> Tokenizer:
    return Tokenizer.load(tiny_folder)


@pytest.fixture(scope="module")
def peer(tiny_folder: Path) -> Any:
    """transformers' own tokenizer of the same folder."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_folder)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a tokenizer that a test may change."""
    tiny.write_tokenizer(tmp_path)
    return tmp_path
