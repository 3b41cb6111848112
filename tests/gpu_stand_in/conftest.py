"""The stand-in for CUDA, compiled once for all tests of this folder."""

from __future__ import annotations

import pytest

from tests.support.fake_cuda.stand_in import StandIn, missing


@pytest.fixture(scope="session")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> StandIn:
    """Skips where torch is not for CUDA, or FlashInfer has no compiled modules."""
    if reason := missing():
        pytest.skip(reason)
    return StandIn(tmp_path_factory.mktemp("fake-cuda"))
