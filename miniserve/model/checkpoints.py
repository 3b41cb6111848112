"""The tensors of files by the names that Hugging Face's plain models give them: of safetensors, plain or as AWQ, GPTQ
and compressed-tensors have packed them, and of GGUF."""

import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from miniserve.config import ConfigError, problem, read_object
from miniserve.ops.quantized import GROUP, Quantized, Weight

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
FP8_BLOCK = 128
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
BLOCKS = {"Q4_0": 18, "Q4_1": 20, "Q8_0": 34}
"""Bytes of a block."""
Read = Callable[[str, tuple[int, ...]], Weight]
"""The tensor of a name, which must have that shape. Raises `ConfigError`."""


class Safetensors:
    """The tensors of open `files`; `packing` is the `quantization_config` of config.json. `names` are those of all
    weights, as plain ones are called; `unread` of tensors that the model has not asked for. `widened` counts what is
    stored in few bits and served in many, by its kind."""

    def __init__(self, folder: Path, files: list[Any], packing: dict[str, Any], widened: Counter[str]) -> None:
        self._folder, self._widened = folder, widened
        self._zeros_are_one_less = packing.get("checkpoint_format") != "gptq_v2"
        # Each in the last of the files that hold it. Files are mapped, not read at once.
        found = {name: (file, name) for file in files for name in file.keys()}  # noqa: SIM118 (not a dict)
        # Of a model that was saved without its head, as some are, names lack the first part.
        # Of one with a tower for images, they say which part is the text model.
        plain = {name.replace("language_model.", "", 1): at for name, at in found.items()}
        self._where = {n if n.startswith(("model.", "lm_head.")) else f"model.{n}": at for n, at in plain.items()}
        self.names = {re.sub(r"\.(qweight|weight_packed)$", ".weight", name) for name in self._where}
        self.unread = set(self._where)

    def read(self, name: str, shape: tuple[int, ...]) -> Weight:
        """What there is decides, whatever lists of modules config.json has."""
        module = name.removesuffix("weight")
        if (tensor := self._get(name)) is not None:
            plain = tensor.is_floating_point() and tensor.itemsize > 1
            return tensor if plain else self._scaled(name, module, tensor)
        if (words := self._get(f"{module}qweight")) is not None:
            return self._awq(module, words) if len(words) == shape[1] else self._gptq(module, words, shape[1])
        if (words := self._get(f"{module}weight_packed")) is not None:
            return self._packed(module, words, shape)
        return self._need(name)

    def _get(self, name: str) -> Tensor | None:
        return self._need(name) if name in self._where else None

    def _need(self, name: str) -> Tensor:
        if name not in self._where:
            raise missing(self._folder, name)
        self.unread.discard(name)
        file, stored = self._where[name]
        return file.get_tensor(stored)

    def _scaled(self, name: str, module: str, weight: Tensor) -> Weight:
        """FP8, dequantized: one scale for all numbers, for each row, or for blocks of 128 x 128. int8 with scales."""
        inverse = self._get(f"{module}weight_scale_inv")
        scales = self._get(f"{module}weight_scale") if inverse is None else inverse
        if scales is None:
            raise ConfigError(problem("model.no_scales", name=name, folder=self._folder, dtype=weight.dtype))
        if weight.dtype is torch.int8:
            return self._grouped(module, 8, weight.view(torch.uint8) + 128, scales, None)
        scales = scales.float().view(-1, scales.shape[-1] if scales.dim() > 1 else 1)
        for axis, (size, count) in enumerate(zip(weight.shape, scales.shape, strict=True)):
            if count not in (1, size, -(-size // FP8_BLOCK)):
                raise IndexError(f"{count} scales for {size} rows or columns")
            each = 1 if count == size else size if count == 1 else FP8_BLOCK
            scales = scales.repeat_interleave(each, axis).narrow(axis, 0, size)
        self._widened["FP8"] += 1
        return weight.float() * scales

    def _awq(self, module: str, words: Tensor) -> Weight:
        """AutoAWQ's layout "gemm": `[in, out / 8]`, in each word first the even columns, then the odd ones."""

        def columns(packed: Tensor) -> Tensor:
            return _unpacked(packed, 4).view(len(packed), -1, 2, 4).transpose(2, 3).reshape(len(packed), -1).t()

        zeros, scales = self._get(f"{module}qzeros"), self._need(f"{module}scales")
        return self._grouped(module, 4, columns(words), scales.t(), None if zeros is None else columns(zeros))

    def _gptq(self, module: str, words: Tensor, size: int) -> Weight:
        """AutoGPTQ's layout: `[in * bits / 32, out]`. Its first version stores zero points less one."""
        bits = 32 * len(words) // size
        zeros, scales = self._get(f"{module}qzeros"), self._need(f"{module}scales")
        if zeros is not None:
            zeros = ((_unpacked(zeros, bits) + self._zeros_are_one_less) & (2**bits - 1)).t()
        self._ordered(f"{module}g_idx", size, len(scales))
        return self._grouped(module, bits, _unpacked(words.t(), bits), scales.t(), zeros)

    def _packed(self, module: str, words: Tensor, shape: tuple[int, ...]) -> Weight:
        """compressed-tensors' pack-quantized: `[out, in * bits / 32]`, zero points `[out * bits / 32, groups]`."""
        bits = 32 * words.shape[1] // shape[1]
        zeros, scales = self._get(f"{module}weight_zero_point"), self._need(f"{module}weight_scale")
        self._get(f"{module}weight_shape")
        self._ordered(f"{module}weight_g_idx", shape[1], scales.shape[1])
        if zeros is not None:
            zeros = _unpacked(zeros.t(), bits)[:, : shape[0]].t()
        return self._grouped(module, bits, _unpacked(words, bits), scales, zeros)

    def _ordered(self, name: str, size: int, groups: int) -> None:
        order = self._get(name)
        if order is not None and not torch.equal(order.long(), torch.arange(size) // (size // groups)):
            raise ConfigError(problem("model.act_order", name=name, folder=self._folder))

    def _grouped(self, module: str, bits: int, codes: Tensor, scales: Tensor, zeros: Tensor | None) -> Weight:
        """(code - zero) * scale, of codes `[out, in]` and zeros `[out, groups]`, both uint8; without zeros it is the
        middle. Dequantized where `Quantized` has no such thing."""
        middle = 2 ** (bits - 1)
        each = codes.shape[1] // scales.shape[1]
        symmetric = zeros is None or bool((zeros == middle).all())
        if each % GROUP or not (symmetric or bits == 4):
            zeros = torch.full_like(scales, middle) if zeros is None else zeros
            self._widened[f"{bits} bits in groups of {each}"] += 1
            return (codes.float() - zeros.repeat_interleave(each, 1)) * scales.float().repeat_interleave(each, 1)
        halves = scales.half().repeat_interleave(each // GROUP, 1)
        minimums = None
        if zeros is not None and not symmetric:
            minimums = (halves.float() * -zeros.float().repeat_interleave(each // GROUP, 1)).half()
        codes = (codes - middle if symmetric else codes).contiguous().view(torch.int8)
        return Quantized(bits, codes, halves, minimums)


def _unpacked(words: Tensor, bits: int) -> Tensor:
    """The numbers in int32 `[rows, n]`, those in the lowest bits first: uint8 `[rows, n * 32 / bits]`."""
    bytes_ = words.contiguous().view(torch.uint8)
    return bytes_ if bits == 8 else torch.stack((bytes_ & 15, bytes_ >> 4), -1).flatten(1)


class GgufTensors:
    """The tensors of the GGUF `file` by the index that `hub/gguf.py` has made of it, read when they are asked for;
    `names`, `unread` and `widened` as with `Safetensors`.

    Blocks of 32 numbers, as llama.cpp lays them out: a float16 scale d, in Q4_1 a float16 minimum m, then the codes. Of
    4 bits the low halves of 16 bytes are the first 16 numbers, the high halves the others. Q4_0 means (code - 8) * d,
    Q4_1 code * d + m, Q8_0 code * d.
    """

    def __init__(self, file: Path, widened: Counter[str]) -> None:
        self._folder, self._widened = file.parent, widened
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
            return _turned(data.view(FLOATS[kind]).view(stored), heads)
        if kind in BLOCKS:
            return _blocks(data, kind, stored, heads)
        import gguf

        plain = gguf.dequantize(data.view(stored[0], -1).numpy(), gguf.GGMLQuantizationType[kind])
        self._widened[kind] += 1
        return _turned(torch.from_numpy(plain).view(stored), heads)


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


def missing(folder: Path, name: str) -> ConfigError:
    tied = "; if its matrix is also the head, set tie_word_embeddings in config.json" if name == HEAD else ""
    return ConfigError(f"{folder} has no tensor {name!r}: not complete, or another architecture{tied}.")


def checked(read: Read, folder: Path, name: str, shape: tuple[int, ...]) -> Weight:
    """What `read` makes of the files in `folder`, if it is whole and has the `shape` that the model's sizes ask for."""
    try:
        weight = read(name, shape)
    except (ArithmeticError, IndexError, RuntimeError, TypeError) as error:
        raise ConfigError(problem("model.damaged", name=name, at=folder, why=" ".join(str(error).split()))) from error
    if tuple(weight.shape) != shape:
        raise ConfigError(problem("model.shape", name=name, folder=folder, found=tuple(weight.shape), shape=shape))
    for part in (weight.scales, weight.minimums) if isinstance(weight, Quantized) else ():
        if part is not None and (part.shape != (shape[0], shape[1] // GROUP) or not part.isfinite().all()):
            raise ConfigError(f"The scales of {name} in {folder} are too few, too many, or not finite in fp16.")
    return weight
