"""Weights of 4 or 8 bits in groups of 32 numbers: what every format that is served in its own bits becomes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

GROUP = 32
"""Numbers along the inner dimension that share a scale. A format with larger groups repeats its scales."""


@dataclass(frozen=True)
class Quantized:
    """A weight `[out, in]`: code * scale + minimum, with one scale and one minimum for each `GROUP` numbers of a row.

    `codes` is int8 `[out, in]`: -128..127 with 8 `bits`, with 4 either -8..7 or, where there are `minimums`, 0..15.
    `scales` and `minimums` are float16 `[out, in / GROUP]`; without `minimums` they are 0. Weights of 8 bits have none.
    """

    bits: int
    codes: torch.Tensor
    scales: torch.Tensor
    minimums: torch.Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    @property
    def nbytes(self) -> int:
        """Bytes that a step reads of it."""
        packed = self.codes.numel() * self.bits // 8
        return packed + sum(part.nbytes for part in (self.scales, self.minimums) if part is not None)

    def dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        """`[out, in]`, each number computed in float32 and rounded once."""
        groups = self.codes.view(len(self.codes), -1, GROUP).float() * self.scales.float().unsqueeze(-1)
        if self.minimums is not None:
            groups += self.minimums.float().unsqueeze(-1)
        return groups.view(self.shape).to(dtype)

    @classmethod
    def cat(cls, parts: Sequence[Quantized]) -> Quantized:
        """Rows of several weights with the same `bits`, one after the other."""
        if any(part.minimums is not None for part in parts):
            parts = [part if part.minimums is not None else part.lifted() for part in parts]
        codes, scales, minimums = zip(*((part.codes, part.scales, part.minimums) for part in parts), strict=True)
        return cls(
            parts[0].bits, torch.cat(codes), torch.cat(scales), None if None in minimums else torch.cat(minimums)
        )

    def lifted(self) -> Quantized:
        """The same numbers of 4 bits with `minimums`."""
        return Quantized(self.bits, self.codes + 8, self.scales, self.scales * -8)
