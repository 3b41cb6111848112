"""Weights from safetensors (one file or shards), or random ones of the same shape.

Tensors are read layer by layer and handed to `ops.linear` at once, so loading never holds the model twice.
"""

import logging
import math
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from miniserve.config import ConfigError
from miniserve.model.config import ModelConfig
from miniserve.ops import Ops
from miniserve.ops.decoder import Layer, Linear, Weights

log = logging.getLogger("miniserve.model")

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Read = Callable[[str, tuple[int, ...]], torch.Tensor]
Progress = Callable[[int, int], None]


def load_weights(
    files: list[Path],
    config: ModelConfig,
    ops: Ops,
    dtype: torch.dtype,
    device: torch.device,
    *,
    progress: Progress = lambda done, total: None,
) -> Weights:
    """All weights in `dtype` on `device`, from `files`, or random ones where there are none; `progress` gets the number
    of layers done and of all. Raises `ConfigError` when a tensor is missing or not as config.json says."""
    if not files:
        return _build(_random(config), set(), config, ops, (dtype, device), progress)
    with ExitStack() as stack:
        where = _tensors([stack.enter_context(safe_open(path, framework="pt")) for path in files])
        unread = set(where)
        read = _reader(files[0].parent, where, unread)
        weights = _build(read, set(where), config, ops, (dtype, device), progress)
    if extra := sorted(name for name in unread if not name.endswith("rotary_emb.inv_freq")):
        log.warning("%d tensors in the files are no part of this model, and not read: %s", len(extra), extra[:3])
    return weights


def _build(
    read: Read, names: set[str], config: ModelConfig, ops: Ops, place: tuple[torch.dtype, torch.device], show: Progress
) -> Weights:
    """`names` are those of all tensors there are."""
    dtype, device = place
    hidden, inner, dim = config.hidden_size, config.intermediate_size, config.head_dim
    q, kv = config.heads * dim, config.kv_heads * dim
    total = 0

    def get(name: str, *shape: int) -> torch.Tensor:
        nonlocal total
        # A copy always: what was read may be a view of the mapped file.
        tensor = read(name, shape).to(device=device, dtype=dtype, copy=True)
        total += tensor.nbytes
        return tensor

    def linear(parts: dict[str, int], width: int, bias: bool) -> Linear:
        """One matrix of several, from their names and rows."""
        weight = torch.cat([get(f"{name}.weight", rows, width) for name, rows in parts.items()])
        biases = [get(f"{name}.bias", rows) for name, rows in parts.items()] if bias else None
        return ops.linear(weight, torch.cat(biases) if biases else None)

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
            gate_up=linear({f"{mlp}gate_proj": inner, f"{mlp}up_proj": inner}, hidden, config.mlp_bias),
            down=linear({f"{mlp}down_proj": hidden}, inner, config.mlp_bias),
        )

    # A tied checkpoint may hold its one matrix under the name of the head.
    only_head = config.tie_embeddings and HEAD in names and EMBEDDING not in names
    embedding = get(HEAD if only_head else EMBEDDING, config.vocab_size, hidden)
    layers = []
    for index in range(config.layers):
        layers.append(layer(index))
        show(index + 1, config.layers)
    norm = get("model.norm.weight", hidden)
    tied = config.tie_embeddings and not names.issuperset((EMBEDDING, HEAD))
    head = embedding if tied else get(HEAD, config.vocab_size, hidden)
    if config.tie_embeddings and not tied:
        if torch.equal(head, embedding):
            total, head = total - head.nbytes, embedding
        else:
            log.warning("config.json says tie_word_embeddings, but the files have another %s: it is used.", HEAD)
    return Weights(embedding, layers, norm, ops.head(head), total)


def _tensors(files: list[Any]) -> dict[str, tuple[Any, str]]:
    """Name -> the open file it is in, the last of those that hold it, and its name there. Files are mapped, not read
    at once."""
    found = {name: (file, name) for file in files for name in file.keys()}  # noqa: SIM118 (not a dict)
    # Of a model that was saved without its head, as some are, names lack the first part.
    return {name if name.startswith(("model.", "lm_head.")) else f"model.{name}": at for name, at in found.items()}


def _reader(folder: Path, where: dict[str, tuple[Any, str]], unread: set[str]) -> Read:
    """Reads tensors by name, and takes them out of `unread`."""

    def read(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        if name not in where:
            tied = "; if its matrix is also the head, set tie_word_embeddings in config.json" if name == HEAD else ""
            raise ConfigError(f"{folder} has no tensor {name!r}: not complete, or another architecture{tied}.")
        unread.discard(name)
        file, stored = where[name]
        tensor = file.get_tensor(stored)
        if tuple(tensor.shape) != shape:
            raise ConfigError(
                f"{name} in {folder} has the shape {tuple(tensor.shape)}, but config.json says {shape}: the files do "
                "not belong together."
            )
        if not tensor.is_floating_point() or tensor.dtype.itemsize < 2:
            raise ConfigError(f"{name} in {folder} is {tensor.dtype}: miniserve serves bf16, fp16 and fp32 weights.")
        return tensor

    return read


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
