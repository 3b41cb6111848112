"""The weights of a model from its files, or random ones of the same shape.

Tensors are read layer by layer and handed to `ops.linear` at once, so loading never holds the model twice.
"""

import logging
import math
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from miniserve.config import ConfigError
from miniserve.model.checkpoints import EMBEDDING, HEAD, Costs, Read, Safetensors, checked
from miniserve.model.config import ModelConfig
from miniserve.model.gguf import GgufTensors
from miniserve.ops import Ops
from miniserve.ops.decoder import Layer, Linear, Weights
from miniserve.ops.quantized import GROUP, Quantized, Weight, dense

log = logging.getLogger("miniserve.model")

NEEDLESS = ("rotary_emb.inv_freq", ".input_scale", ".k_scale", ".v_scale")
"""How names of tensors end that nothing is computed with here."""
Progress = Callable[[int, int], None]
Target = tuple[torch.dtype, torch.device, int | None]
"""The dtype and the device of what is made, and the bits of plain matrices."""
QUANTIZATIONS = {"int8": 8, "int4": 4}
"""Bits of what is made at load from plain weights. The head is in 8 bits with both, as 4 cost it the most; the rows of
the embedding are looked up, and stay as they are."""


def load_weights(
    files: list[Path],
    config: ModelConfig,
    ops: Ops,
    dtype: torch.dtype,
    device: torch.device,
    *,
    packing: dict[str, Any],
    quantization: str | None = None,
    progress: Progress = lambda done, total: None,
) -> Weights:
    """All weights on `device`, from `files`, or random ones where there are none: in `dtype`, in their own 4 or 8 bits
    where they have so many, or as the `quantization` of `QUANTIZATIONS` makes them. `packing` is what config.json
    says of quantized ones, `progress` gets the number of layers done and of all. Raises `ConfigError` when a tensor is
    missing or not as config.json says."""
    costs, how = Costs(), (dtype, device, QUANTIZATIONS.get(quantization or ""))
    if not files:
        return _build(_random(config), set(), config, ops, how, costs, progress)
    with ExitStack() as stack:
        if files[0].suffix == ".gguf":
            store: GgufTensors | Safetensors = GgufTensors(files[0], costs)
        else:
            opened = [stack.enter_context(safe_open(path, framework="pt")) for path in files]
            store = Safetensors(files[0].parent, opened, packing, costs)
        weights = _build(partial(checked, store.read, files[0].parent), store.names, config, ops, how, costs, progress)
    if extra := sorted(name for name in store.unread if not name.endswith(NEEDLESS)):
        log.warning("%d tensors in the files are no part of this model, and not read: %s", len(extra), extra[:3])
    for line in costs.lines(dtype):
        log.warning(line)
    return weights


def _build(
    read: Read, names: set[str], config: ModelConfig, ops: Ops, how: Target, costs: Costs, show: Progress
) -> Weights:
    """`names` are those of all tensors there are."""
    dtype, device, bits = how
    hidden, inner, dim = config.hidden_size, config.intermediate_size, config.head_dim
    q, kv = config.heads * dim, config.kv_heads * dim
    if bits and any(size % GROUP for size in (hidden, inner, q)):
        raise ConfigError(
            f"--quantization takes {GROUP} numbers of a row together, and rows of this model have {hidden}, {inner} "
            f"and {q}: leave it out."
        )
    total = 0

    def plain(weight: Weight) -> torch.Tensor:
        # A copy always: what was read may be a view of the mapped file.
        return dense(weight.to(device), dtype).to(dtype, copy=isinstance(weight, torch.Tensor))

    def get(name: str, *shape: int) -> torch.Tensor:
        nonlocal total
        tensor = plain(read(name, shape))
        total += tensor.nbytes
        return tensor

    def counted(weight: Weight) -> Weight:
        """A GPU computes with plain numbers."""
        nonlocal total
        total += weight.nbytes if device.type == "cpu" else weight.shape.numel() * dtype.itemsize
        return weight

    def linear(parts: dict[str, int], width: int, bias: bool, prepare: Any = ops.linear) -> Linear:
        """One matrix of several, from their names and rows."""
        weights = [read(f"{name}.weight", (rows, width)).to(device) for name, rows in parts.items()]
        if bits:
            weights = [Quantized.of(weight, bits) if isinstance(weight, torch.Tensor) else weight for weight in weights]
        packed = [weight for weight in weights if isinstance(weight, Quantized)]
        if len(packed) == len(weights) and len({weight.bits for weight in packed}) == 1:
            whole: Weight = Quantized.cat(packed)
        else:
            whole = torch.cat([dense(weight, dtype).to(dtype) for weight in weights])
            for weight in packed:
                costs.add("parts of a matrix whose others are in another format", weight.codes.numel(), weight.nbytes)
        biases = [get(f"{name}.bias", rows) for name, rows in parts.items()] if bias else None
        return prepare(counted(whole), torch.cat(biases) if biases else None)

    def layer(index: int) -> Layer:
        at = f"model.layers.{index}."
        attn, mlp = f"{at}self_attn.", f"{at}mlp."
        return Layer(
            input_norm=get(f"{at}input_layernorm.weight", hidden),
            qkv=linear({f"{attn}q_proj": q, f"{attn}k_proj": kv, f"{attn}v_proj": kv}, hidden, config.qkv_bias),
            q_norm=get(f"{attn}q_norm.weight", dim) if config.qk_norm else None,
            k_norm=get(f"{attn}k_norm.weight", dim) if config.qk_norm else None,
            out=linear({f"{attn}o_proj": hidden}, q, config.output_bias),
            post_norm=get(f"{at}post_attention_layernorm.weight", hidden),
            gate_up=linear({f"{mlp}gate_proj": inner, f"{mlp}up_proj": inner}, hidden, config.mlp_bias, ops.gated),
            down=linear({f"{mlp}down_proj": hidden}, inner, config.mlp_bias),
        )

    # A tied checkpoint may hold its one matrix under the name of the head.
    only_head = config.tie_embeddings and HEAD in names and EMBEDDING not in names
    matrix = read(HEAD if only_head else EMBEDDING, (config.vocab_size, hidden))
    embedding = plain(matrix)
    total += embedding.nbytes
    layers = []
    for index in range(config.layers):
        layers.append(layer(index))
        show(index + 1, config.layers)
    norm = get("model.norm.weight", hidden)
    tied = config.tie_embeddings and not names.issuperset((EMBEDDING, HEAD))
    if not tied:
        matrix = read(HEAD, (config.vocab_size, hidden))
        tied = config.tie_embeddings and torch.equal(plain(matrix), embedding)
        if config.tie_embeddings and not tied:
            log.warning("config.json says tie_word_embeddings, but the files have another %s: it is used.", HEAD)
    if bits and isinstance(matrix, torch.Tensor):
        matrix = Quantized.of(matrix.to(device), 8)
    if tied and (isinstance(matrix, torch.Tensor) or device.type != "cpu"):
        head: Weight = embedding
    else:
        head = counted(matrix if isinstance(matrix, Quantized) else plain(matrix))
    return Weights(embedding, layers, norm, ops.head(head), total)


def _random(config: ModelConfig) -> Read:
    """Random tensors, the same in each process for the same shape. Norms are ones, so that numbers stay in range."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2**20, generator=generator) * 0.02

    def read(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        if "norm" in name:
            return torch.ones(shape, dtype=config.dtype)
        # Repeating a megabyte of noise at a random offset is as good for timing as fresh noise and 20x faster.
        count = math.prod(shape)
        block = noise.roll(int(torch.randint(2**20, (1,), generator=generator))).to(config.dtype)
        return block.repeat(-(-count // block.numel()))[:count].view(shape)

    return read
