"""What checks are given and what they give. Nothing of torch is imported here, so that the process which starts checks
and writes the report is there at once, and no fault of a library can end it."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Figure:
    """A number that a check found, and what it must be: `rule` is `<=`, `>=` or `==` against `limit`, or empty for a
    number that is only reported."""

    name: str
    value: float | str
    unit: str = ""
    rule: str = ""
    limit: float | str = 0.0

    @property
    def ok(self) -> bool:
        """Whether it is within its limit. Not a number is within none."""
        if not self.rule:
            return True
        if self.rule == "==":
            return self.value == self.limit
        try:
            value, limit = float(self.value), float(self.limit)
        except ValueError:  # words in place of a number
            return False
        return value <= limit if self.rule == "<=" else value >= limit


Figures = Iterator[Figure]
"""A check gives its figures one by one, so that those before an error are known."""


@dataclass
class Setting:
    """Where the checks run. `small` makes everything toy-sized; `folder` is for files that may go afterwards."""

    device: str
    small: bool
    folder: Path
    kept: dict[str, Any] = field(default_factory=dict)
    """What a check has found or made and later ones use again."""

    @property
    def cuda(self) -> bool:
        """Whether there is a GPU."""
        return self.device.startswith("cuda")

    @property
    def half(self) -> torch.dtype:
        """The dtype that serves: bf16, or fp32 on a CPU that has no bf16."""
        import torch

        from miniserve.ops.torch_ops import native_bf16

        return torch.bfloat16 if self.cuda or native_bf16() else torch.float32

    def sync(self) -> None:
        """Wait for the device."""
        if self.cuda:
            import torch

            torch.cuda.synchronize()

    def keep(self, name: str, make: Callable[[], Any]) -> Any:
        """What `make` makes, once."""
        if name not in self.kept:
            self.kept[name] = make()
        return self.kept[name]

    def release(self) -> None:
        """Give back what is only cached, so that other processes find the memory."""
        gc.collect()
        if self.cuda:
            import torch

            torch.cuda.empty_cache()
