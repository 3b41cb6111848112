"""What all layers share in one pass over a batch."""

from dataclasses import dataclass
from typing import Any

from miniserve.ops import StepOps


@dataclass(frozen=True)
class Pass:
    """`plan` is that of `ops` for the batch; `rotary` has cos and sin of its positions by rotary table; `eps` is that
    of norms."""

    ops: StepOps
    plan: Any
    rotary: list[Any]
    eps: float
