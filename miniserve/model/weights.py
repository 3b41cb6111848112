"""The weights of a model from its files, or random ones of the same shape.

Tensors are read layer by layer and handed to `ops.linear` at once, so loading never holds the model twice.
"""

import logging
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from miniserve.model.checkpoints import EMBEDDING, HEAD, Costs, GgufTensors, Safetensors, checked
from miniserve.model.config import LayerConfig
from miniserve.model.layers import load_attention, load_delta_net, load_mlp
from miniserve.model.loader import Loader, check_groups, random
from miniserve.model.shards import Shard
from miniserve.ops import Ops
from miniserve.ops.decoder import Layer, Weights
from miniserve.ops.quantized import Quantized, Weight

log = logging.getLogger("miniserve.model")

NEEDLESS = ("rotary_emb.inv_freq", ".input_scale", ".k_scale", ".v_scale")
"""How names of tensors end that nothing is computed with here."""
OTHER_PARTS = ("model.visual.", "model.vision_tower.", "model.multi_modal_projector.", "model.mtp.")
"""How names of tensors begin that are no part of the text model."""
Progress = Callable[[int, int], None]
QUANTIZATIONS = {"int8": 8, "int4": 4}
"""Bits of what is made at load from plain weights. The head is in 8 bits with both, as 4 cost it the most; the rows of
the embedding are looked up, and stay as they are."""


def load_weights(
    files: list[Path],
    shard: Shard,
    ops: Ops,
    dtype: torch.dtype,
    device: torch.device,
    *,
    packing: dict[str, Any],
    quantization: str | None = None,
    progress: Progress = lambda done, total: None,
) -> Weights:
    """All of a `shard` on `device`, from `files`, or random weights where there are none: in `dtype`, in their own 4 or
    8 bits where they have so many, or as the `quantization` of `QUANTIZATIONS` makes them. `packing` is what
    config.json says of quantized ones, `progress` gets the number of layers done and of all. Raises `ConfigError` when
    a tensor is missing or not as config.json says, or cannot be cut."""
    costs, bits = Costs(), QUANTIZATIONS.get(quantization or "")
    if bits:
        check_groups(shard.config)
    if not files:
        return _build(Loader(random(shard.whole), set(), shard, ops, dtype, device, bits, costs), progress)
    with ExitStack() as stack:
        if files[0].suffix == ".gguf":
            store: GgufTensors | Safetensors = GgufTensors(files[0], costs)
        else:
            opened = [stack.enter_context(safe_open(path, framework="pt")) for path in files]
            store = Safetensors(files[0].parent, opened, packing, costs)
        read = partial(checked, store.read, files[0].parent)
        weights = _build(Loader(read, store.names, shard, ops, dtype, device, bits, costs), progress)
    extra = sorted(n for n in store.unread if not n.endswith(NEEDLESS) and not n.startswith(OTHER_PARTS))
    if extra:
        log.warning("%d tensors in the files are no part of this model, and not read: %s", len(extra), extra[:3])
    for line in costs.lines(dtype):
        log.warning(line)
    return weights


def _build(loader: Loader, show: Progress) -> Weights:
    config, ops = loader.config, loader.ops
    shape = config.vocab_size, config.hidden_size
    # A tied checkpoint may hold its one matrix under the name of the head.
    only_head = config.tie_embeddings and HEAD in loader.names and EMBEDDING not in loader.names
    matrix = loader.read(HEAD if only_head else EMBEDDING, *shape)
    embedding = loader.dense(matrix)
    loader.num_bytes += embedding.nbytes
    layers = []
    for index, layer in enumerate(config.layers):
        before = sum(earlier.attends == layer.attends for earlier in config.layers[:index])
        layers.append(_layer(loader, f"model.layers.{index}.", layer, before))
        show(index + 1, len(config.layers))
    norm = loader.norm("model.norm.weight", config.hidden_size)
    tied = config.tie_embeddings and not loader.names.issuperset((EMBEDDING, HEAD))
    if not tied:
        matrix = loader.read(HEAD, *shape)
        tied = config.tie_embeddings and torch.equal(loader.dense(matrix), embedding)
        if config.tie_embeddings and not tied:
            log.warning("config.json says tie_word_embeddings, but the files have another %s: it is used.", HEAD)
    if loader.bits and isinstance(matrix, Tensor):
        matrix = Quantized.of(matrix, 8)
    on_cpu = loader.device.type == "cpu"
    if tied and (isinstance(matrix, Tensor) or not on_cpu):
        head: Weight = loader.shard.head(embedding)
    else:
        head = loader.shard.head(matrix if isinstance(matrix, Quantized) else loader.dense(matrix))
        loader.num_bytes += head.nbytes if on_cpu else head.shape.numel() * loader.dtype.itemsize
    # Gemma's own code rounds the factor to the dtype of the model.
    scale = float(torch.tensor(config.hidden_size**0.5).to(loader.dtype)) if config.family.scaled else 1.0
    return Weights(embedding, scale, layers, norm, config.norm_eps, ops.head(head), loader.num_bytes)


def _layer(loader: Loader, at: str, layer: LayerConfig, index: int) -> Layer:
    """The layer whose tensors are named `at`; `index` is its number among those that attend, or do not, as it does."""
    config, extra = loader.config, loader.config.family.after_norms

    def norm(name: str) -> Tensor:
        return loader.norm(f"{at}{name}_layernorm.weight", config.hidden_size)

    return Layer(
        input_norm=norm("input"),
        mixer=load_attention(loader, f"{at}self_attn.", layer, index)
        if layer.attends
        else load_delta_net(loader, f"{at}linear_attn.", index),
        mixer_norm=norm("post_attention") if extra else None,
        post_norm=norm("pre_feedforward" if extra else "post_attention"),
        mlp=load_mlp(loader, at, layer),
        mlp_norm=norm("post_feedforward") if extra else None,
    )
