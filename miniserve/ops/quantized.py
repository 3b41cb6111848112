"""Weights of 4 or 8 bits in groups of 32 numbers: what every format that is served in its own bits becomes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

GROUP = 32
"""Numbers along the inner dimension that share a scale. A format with larger groups repeats its scales."""
PEAKS = (-8, -9, -7)
"""What the largest number of a group may become with 4 bits. A code of -9 is cut to -8: the peak loses, the others
gain."""


@dataclass(frozen=True)
class Quantized:
    """A weight `[out, in]`: code * scale + minimum, with one scale and one minimum for each `GROUP` numbers of a row.

    `codes` is int8 `[out, in]`: -128..127 with 8 `bits`, with 4 either -8..7 or, where there are `minimums`, 0..15.
    `scales` and `minimums` are float16 `[out, in / GROUP]`; without `minimums` they are 0. Weights of 8 bits have none.
    All of them are contiguous.
    """

    bits: int
    codes: Tensor
    scales: Tensor
    minimums: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    @property
    def nbytes(self) -> int:
        """Bytes that a step reads of it."""
        packed = self.codes.numel() * self.bits // 8
        return packed + sum(part.nbytes for part in (self.scales, self.minimums) if part is not None)

    def to(self, device: torch.device) -> Quantized:
        minimums = None if self.minimums is None else self.minimums.to(device)
        return Quantized(self.bits, self.codes.to(device), self.scales.to(device), minimums)

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """`[out, in]`, each number computed in float32 and rounded once; what stays in the cache at a time."""
        out = torch.empty(self.shape, dtype=dtype, device=self.codes.device)
        step = max(1, 2**19 // self.shape[1])
        for start in range(0, len(out), step):
            rows = slice(start, start + step)
            groups = self.codes[rows].float().unflatten(1, (-1, GROUP))
            groups *= self.scales[rows].float().unsqueeze(-1)
            if self.minimums is not None:
                groups += self.minimums[rows].float().unsqueeze(-1)
            out[rows] = groups.flatten(1)
        return out

    def __getitem__(self, rows: Tensor) -> Quantized:
        minimums = None if self.minimums is None else self.minimums[rows]
        return Quantized(self.bits, self.codes[rows], self.scales[rows], minimums)

    def columns(self, start: int, count: int) -> Quantized:
        """So many columns from `start` on; both must be multiples of `GROUP`."""
        groups = slice(start // GROUP, (start + count) // GROUP)
        minimums = None if self.minimums is None else self.minimums[:, groups].contiguous()
        codes = self.codes[:, start : start + count].contiguous()
        return Quantized(self.bits, codes, self.scales[:, groups].contiguous(), minimums)

    @classmethod
    def of(cls, weight: Tensor, bits: int) -> Quantized:
        """The nearest to a weight `[out, in]` of any float dtype, symmetric. `in` must be a multiple of `GROUP`. With 8
        bits the largest number of a group becomes 127, with 4 that of `PEAKS` with the least squared error over the
        group, each with the scale that is best for its codes."""
        groups = weight.float().view(len(weight), -1, GROUP)
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        if bits == 8:
            scales = (torch.maximum(-low, high) / 127).half()
            codes = _rounded(groups, scales.float(), bits)
        else:
            peak = torch.where(-low > high, low, high)
            most, best = torch.full_like(peak, PEAKS[0]), torch.full_like(peak, -1.0)
            for candidate in PEAKS:
                codes = _rounded(groups, peak / candidate, bits)
                # With the best scale, fit / square, the error is the sum of all squares less this:
                fit, square = (codes * groups).sum(-1, keepdim=True), codes.square().sum(-1, keepdim=True)
                gain = fit.square() / square.clamp_(min=1)
                most, best = torch.where(gain > best, candidate, most), torch.maximum(gain, best)
            codes = _rounded(groups, peak / most, bits)
            square = codes.square().sum(-1, keepdim=True).clamp_(min=1)
            scales = ((codes * groups).sum(-1, keepdim=True) / square).half()
        return cls(bits, codes.to(torch.int8).view(weight.shape), scales.squeeze(-1))

    @classmethod
    def cat(cls, parts: Sequence[Quantized]) -> Quantized:
        """Rows of several weights with the same `bits`, one after the other."""
        if any(part.minimums is not None for part in parts):
            parts = [part if part.minimums is not None else part.lifted() for part in parts]
        minimums = [part.minimums for part in parts if part.minimums is not None]
        codes, scales = torch.cat([part.codes for part in parts]), torch.cat([part.scales for part in parts])
        return cls(parts[0].bits, codes, scales, torch.cat(minimums) if minimums else None)

    def lifted(self) -> Quantized:
        """The same numbers of 4 bits with `minimums`."""
        return Quantized(self.bits, self.codes + 8, self.scales, self.scales * -8)


Weight = Tensor | Quantized


def dense(weight: Weight, dtype: torch.dtype) -> Tensor:
    """A weight as plain numbers: dequantized to `dtype`, or as it is."""
    return weight.dequantized(dtype) if isinstance(weight, Quantized) else weight


def _rounded(groups: Tensor, scales: Tensor, bits: int) -> Tensor:
    """The codes nearest to `groups` for these scales, as floats."""
    inverse = (1 / scales).nan_to_num(posinf=0.0, neginf=0.0)  # 1 / 1e-39 is infinite, and such a scale is 0 in float16
    return (groups * inverse).round_().clamp_(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
