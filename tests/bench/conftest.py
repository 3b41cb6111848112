"""Fixtures of the tests of measuring clients."""

from __future__ import annotations

import pytest

from miniserve.hub import resolve as hub
from miniserve.text.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """The default model's, as far as its preset has it."""
    return Tokenizer.load(hub.resolve("smollm2-135m", load_format="dummy").folder)
