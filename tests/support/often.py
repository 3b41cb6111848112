"""Cases that differ little from one another."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest


def often(names: Iterable[str], *kept: str) -> list[Any]:
    """`names` for `parametrize`: those `kept`, and the others, which CI leaves out."""
    return [*kept, *(pytest.param(name, marks=pytest.mark.long) for name in names if name not in kept)]
