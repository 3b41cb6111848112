"""The tensors of a GGUF file by the index that `hub/gguf.py` has made of it.

Blocks of 32 numbers, as llama.cpp lays them out: a float16 scale d, in Q4_1 a float16 minimum m, then the codes. Of 4
bits the low halves of 16 bytes are the first 16 numbers, the high halves the others. Q4_0 means (code - 8) * d, Q4_1
code * d + m, Q8_0 code * d.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from miniserve.config import read_object
from miniserve.model.checkpoints import Costs, missing
from miniserve.ops.quantized import Quantized, Weight

FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
BLOCKS = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}
"""Bytes of a block."""


class GgufTensors:
    """The tensors of `file`; `names` are those of all. Each is read when it is asked for."""

    def __init__(self, file: Path, costs: Costs) -> None:
        self._folder, self._costs = file.parent, costs
        self._index = read_object(file.with_suffix(".json"))
        self._bytes = torch.from_numpy(np.memmap(file, mode="c"))
        self.names = set(self._index)
        self.unread = set(self._index)

    def read(self, name: str, shape: tuple[int, ...]) -> Weight:
        if name not in self._index:
            raise missing(self._folder, name)
        self.unread.discard(name)
        offset, size, kind, stored, heads = self._index[name]
        data = self._bytes[offset : offset + size]
        if kind in FLOATS:
            weight: Weight = _turned(data.view(FLOATS[kind]).view(stored), heads)
        elif kind in BLOCKS:
            weight = _blocks(data, kind, stored, heads)
        else:
            import gguf

            rows = data.view(stored[0], -1).numpy()
            plain = gguf.dequantize(rows, gguf.GGMLQuantizationType[kind])
            weight = _turned(torch.from_numpy(plain).view(stored), heads)
            self._costs.add(kind, weight.numel(), size)
        return weight


def _blocks(data: Tensor, kind: str, shape: list[int], heads: int) -> Quantized:
    blocks = data.view(-1, BLOCKS[kind])
    numbers = blocks[:, 4 if kind == "Q4_1" else 2 :]
    if kind == "Q8_0":
        codes = numbers.contiguous().view(torch.int8)
    else:
        codes = torch.cat((numbers & 15, numbers >> 4), 1).view(torch.int8)
        codes -= 8 if kind == "Q4_0" else 0

    def halves(start: int) -> Tensor:
        column = blocks[:, start : start + 2].contiguous().view(torch.float16)
        return _turned(column.view(shape[0], -1), heads)

    codes = _turned(codes.reshape(shape), heads)
    return Quantized(8 if kind == "Q8_0" else 4, codes, halves(0), halves(2) if kind == "Q4_1" else None)


def _turned(rows: Tensor, heads: int) -> Tensor:
    """Rows in Hugging Face's order: llama.cpp keeps the two numbers that rope turns together side by side in a head,
    Hugging Face half a head apart."""
    return rows.view(heads, -1, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape) if heads else rows
