"""Reads the tensors that a part of a model asks for, and has some `Ops` prepare them for their device."""

import math
from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from miniserve.model.checkpoints import Read
from miniserve.model.config import ModelConfig
from miniserve.model.shards import Shard
from miniserve.ops import Ops
from miniserve.ops.decoder import Head, Linear
from miniserve.ops.quantized import Quantized, Weight, dense


@dataclass
class Loader:
    """`read_tensor` gets a whole tensor of a name and a shape, `names` are those of all there are, `shard` says what of
    them is wanted here. Plain matrices become quantized ones of so many `bits`, if any. `num_bytes` counts what was
    made."""

    read_tensor: Read
    names: set[str]
    shard: Shard
    ops: Ops
    dtype: torch.dtype
    device: torch.device
    bits: int | None
    widened: Counter[str]
    num_bytes: int = 0

    @property
    def config(self) -> ModelConfig:
        """The sizes of what is loaded here."""
        return self.shard.config

    def has(self, name: str) -> bool:
        """Whether the files hold the tensor, or the weight of a module, of that name."""
        return name in self.names or f"{name}.weight" in self.names

    def read(self, name: str, *shape: int) -> Weight:
        """What the shard has of a tensor, in this shape, as it is stored, on the device. Raises `ConfigError`."""
        return self.shard.read(self.read_tensor, name, shape).to(self.device)

    def get(self, name: str, *shape: int, exact: bool = False) -> Tensor:
        """A plain tensor in the model's dtype, or in float32 if it is to be `exact`."""
        tensor = self.dense(self.read(name, *shape), torch.float32 if exact else self.dtype)
        self.num_bytes += tensor.nbytes
        return tensor

    def norm(self, name: str, size: int) -> Tensor:
        """The weights of a norm."""
        if not self.config.family.zero_norms:
            return self.get(name, size)
        return (self.get(name, size, exact=True) + 1).to(self.dtype)

    def dense(self, weight: Weight, dtype: torch.dtype | None = None) -> Tensor:
        """A copy always: what was read may be a view of the mapped file."""
        made = dense(weight, dtype or self.dtype)
        return made.to(dtype or self.dtype, copy=isinstance(weight, Tensor))

    def linear(
        self, parts: dict[str, int], width: int, bias: bool = False, *, gated: str = "", order: Tensor | None = None
    ) -> Linear:
        """One matrix of several, from their names and rows, the rows perhaps in another `order`. With `gated` the first
        half makes gates with that activation."""
        weights = [self.read(f"{name}.weight", rows, width) for name, rows in parts.items()]
        biases = [self.get(f"{name}.bias", rows) for name, rows in parts.items()] if bias else None
        return self.prepared(weights, torch.cat(biases) if biases else None, gated=gated, order=order)

    def plain(self, parts: dict[str, int], width: int, order: Tensor | None = None) -> Head:
        """A small matrix, which is never quantized."""
        whole = torch.cat([self.get(f"{name}.weight", rows, width) for name, rows in parts.items()])
        return self.ops.head(whole if order is None else whole[order])

    def prepared(
        self, weights: list[Weight], bias: Tensor | None, *, gated: str = "", order: Tensor | None = None
    ) -> Linear:
        """One matrix of the rows of several, as `linear` makes it of what was read."""
        if self.bits:
            weights = [Quantized.of(w, self.bits) if isinstance(w, Tensor) else w for w in weights]
        packed = [weight for weight in weights if isinstance(weight, Quantized)]
        if len(packed) == len(weights) and len({weight.bits for weight in packed}) == 1:
            whole: Weight = Quantized.cat(packed)
        else:
            whole = torch.cat([dense(weight, self.dtype).to(self.dtype) for weight in weights])
            if packed:
                self.widened["parts of a matrix whose others are in another format"] += len(packed)
        if order is not None:
            whole, bias = whole[order], None if bias is None else bias[order]
        # A GPU computes with plain numbers.
        self.num_bytes += whole.nbytes if self.device.type == "cpu" else math.prod(whole.shape) * self.dtype.itemsize
        return self.ops.gated(whole, bias, gated) if gated else self.ops.linear(whole, bias)


def random(config: ModelConfig, device: torch.device) -> Read:
    """Random tensors on a device, the same in each process. Norms are ones, so that numbers stay in range."""
    generator = torch.Generator().manual_seed(0)
    noise = (torch.randn(2**20, generator=generator) * 0.02).to(device)

    def read(name: str, shape: tuple[int, ...]) -> Tensor:
        if "norm" in name:
            return torch.ones(shape, dtype=config.dtype, device=device)
        # Repeating a megabyte of noise at a random offset is as good for timing as fresh noise and 20x faster.
        count = math.prod(shape)
        block = noise.roll(int(torch.randint(2**20, (1,), generator=generator))).to(config.dtype)
        return block.repeat(-(-count // block.numel()))[:count].view(shape)

    return read
