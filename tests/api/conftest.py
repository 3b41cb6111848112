"""Fixtures of tests that see the API as its clients do."""

from __future__ import annotations

import pytest

from miniserve.text.tokenizer import Tokenizer
from tests.support.api import Api, reset, shared_app
from tests.support.fake_engine import EOS, spell


@pytest.fixture
def api(tokenizer: Tokenizer) -> Api:
    """An engine that says Hello; its app is shared, so that metrics and stored responses are those of all tests."""
    app, engine = shared_app(tokenizer)
    reset(engine, steps=[*spell("Hello"), [EOS]], stop_token=EOS, cached=16)
    return Api(app, engine)
