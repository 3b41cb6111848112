"""The weights of a model from its files, or random ones of the same shape, read layer by layer and handed to
`ops.linear` at once, so that loading never holds the model twice."""

import logging
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from miniserve.config import ConfigError, problem
from miniserve.model.checkpoints import EMBEDDING, HEAD, GgufTensors, Safetensors, checked
from miniserve.model.config import LayerConfig
from miniserve.model.loader import Loader, random
from miniserve.model.shards import Shard
from miniserve.ops import Ops
from miniserve.ops.decoder import Attention, DeltaNet, Experts, Layer, Mlp, Weights
from miniserve.ops.quantized import GROUP, Quantized, Weight

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
    widened, bits = Counter[str](), QUANTIZATIONS.get(quantization or "")
    if bits and (wrong := [width for width in shard.config.widths if width % GROUP]):
        raise ConfigError(problem("model.rows", group=GROUP, widths=", ".join(map(str, wrong))))
    if not files:
        return _build(Loader(random(shard.whole, device), set(), shard, ops, dtype, device, bits, widened), progress)
    with ExitStack() as stack:
        if files[0].suffix == ".gguf":
            store: GgufTensors | Safetensors = GgufTensors(files[0], widened)
        else:
            opened = [stack.enter_context(safe_open(path, framework="pt")) for path in files]
            store = Safetensors(files[0].parent, opened, packing, widened)
        read = partial(checked, store.read, files[0].parent)
        weights = _build(Loader(read, store.names, shard, ops, dtype, device, bits, widened), progress)
    extra = sorted(n for n in store.unread if not n.endswith(NEEDLESS) and not n.startswith(OTHER_PARTS))
    if extra:
        log.warning("%d tensors in the files are no part of this model, and not read: %s", len(extra), extra[:3])
    for kind, count in widened.items():
        served = str(dtype).removeprefix("torch.")
        log.warning("%d tensors (%s) are served as %s: a step reads more than the files have.", count, kind, served)
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
        mixer=_attention(loader, f"{at}self_attn.", layer, index)
        if layer.attends
        else _delta_net(loader, f"{at}linear_attn.", index),
        mixer_norm=norm("post_attention") if extra else None,
        post_norm=norm("pre_feedforward" if extra else "post_attention"),
        mlp=_mlp(loader, at, layer),
        mlp_norm=norm("post_feedforward") if extra else None,
    )


def _attention(loader: Loader, at: str, layer: LayerConfig, index: int) -> Attention:
    """The attention of a layer whose tensors are named `at`: grouped heads, perhaps norms of q and k, a window, a gate
    on the output."""
    config = loader.config
    q, kv, hidden = config.heads * config.head_dim, config.kv_heads * config.head_dim, config.hidden_size
    gated, normed, order = config.family.gated, config.family.qk_norm, None
    if gated:
        # In the files each head's gate follows on its queries; here all gates come last.
        heads = torch.arange(2 * q).view(config.heads, 2, -1)
        order = torch.cat((heads[:, 0].flatten(), torch.arange(2 * q, 2 * q + 2 * kv), heads[:, 1].flatten()))
    rows = {f"{at}q_proj": q * (1 + gated), f"{at}k_proj": kv, f"{at}v_proj": kv}
    return Attention(
        index=index,
        heads=config.heads,
        kv_heads=config.kv_heads,
        dim=config.head_dim,
        scale=config.attention_scale,
        window=layer.window,
        rope=layer.rope,
        gated=gated,
        qkv=loader.linear(rows, hidden, config.qkv_bias, order=order),
        q_norm=loader.norm(f"{at}q_norm.weight", config.head_dim) if normed else None,
        k_norm=loader.norm(f"{at}k_norm.weight", config.head_dim) if normed else None,
        out=loader.linear({f"{at}o_proj": hidden}, q, config.output_bias),
    )


def _delta_net(loader: Loader, at: str, index: int) -> DeltaNet:
    """The delta net of a layer whose tensors are named `at`."""
    sizes, hidden = loader.config.delta, loader.config.hidden_size
    assert sizes is not None
    values = sizes.v_heads * sizes.v_dim
    if loader.has(f"{at}in_proj_qkvz"):
        # One group of rows for each head of keys: what belongs to it and to its heads of values.
        shared = sizes.v_heads // sizes.k_heads
        parts = sizes.k_dim, sizes.k_dim, shared * sizes.v_dim, shared * sizes.v_dim
        order = _by_kind(sizes.k_heads, *parts)
        qkvz = loader.linear({f"{at}in_proj_qkvz": sizes.channels + values}, hidden, order=order)
        order = _by_kind(sizes.k_heads, shared, shared)
        ba = loader.plain({f"{at}in_proj_ba": 2 * sizes.v_heads}, hidden, order)
    else:
        qkvz = loader.linear({f"{at}in_proj_qkv": sizes.channels, f"{at}in_proj_z": values}, hidden)
        ba = loader.plain({f"{at}in_proj_b": sizes.v_heads, f"{at}in_proj_a": sizes.v_heads}, hidden)
    conv = loader.get(f"{at}conv1d.weight", sizes.channels, 1, sizes.taps)
    return DeltaNet(
        **vars(sizes),
        index=index,
        qkvz=qkvz,
        ba=ba,
        conv=conv.squeeze(1).t().contiguous(),
        rate=-loader.get(f"{at}A_log", sizes.v_heads, exact=True).exp(),
        bias=loader.get(f"{at}dt_bias", sizes.v_heads, exact=True),
        norm=loader.get(f"{at}norm.weight", sizes.v_dim),
        out=loader.linear({f"{at}out_proj": hidden}, values),
    )


def _by_kind(groups: int, *sizes: int) -> Tensor:
    """The order that brings together what each of `groups` groups of rows has first, second and so on: so many rows of
    each kind."""
    rows = torch.arange(groups * sum(sizes)).view(groups, -1)
    return torch.cat([kind.flatten() for kind in rows.split(sizes, 1)])


def _mlp(loader: Loader, at: str, layer: LayerConfig) -> Mlp | Experts:
    """The MLP, or the experts of which a few work on a token, of the layer whose tensors are named `at`."""
    config = loader.config
    sizes = config.experts if layer.experts else None
    if sizes is None:
        names = [f"{at}mlp.{name}_proj" for name in ("gate", "up", "down")]
        return _gated(loader, names, config.intermediate_size, bias=config.mlp_bias)
    router, where, *parts = config.family.experts
    # transformers and newer files have all experts in one tensor, older files each by itself.
    together = f"{at}mlp.experts.gate_up_proj", f"{at}mlp.experts.down_proj"
    if loader.has(together[0]):
        gate_up = loader.dense(loader.read(together[0], sizes.count, 2 * sizes.inner, config.hidden_size))
        down = loader.dense(loader.read(together[1], sizes.count, config.hidden_size, sizes.inner))
        experts = [
            Mlp(loader.prepared([up], None, gated=config.activation), loader.prepared([back], None))
            for up, back in zip(gate_up, down, strict=True)
        ]
    else:
        named = ([f"{at}{where}.{i}.{part}" for part in parts] for i in range(sizes.count))
        experts = [_gated(loader, names, sizes.inner) for names in named]
    inner, shared = sizes.shared_inner, [f"{at}mlp.shared_expert.{name}_proj" for name in ("gate", "up", "down")]
    return Experts(
        chosen=sizes.chosen,
        renormed=sizes.renormed,
        router=loader.plain({at + router: sizes.count}, config.hidden_size),
        experts=loader.ops.stack(experts),
        shared=_gated(loader, shared, inner) if inner else None,
        shared_gate=loader.plain({f"{at}mlp.shared_expert_gate": 1}, config.hidden_size) if inner else None,
    )


def _gated(loader: Loader, names: list[str], inner: int, bias: bool = False) -> Mlp:
    (gate, up, down), config = names, loader.config
    return Mlp(
        loader.linear({gate: inner, up: inner}, config.hidden_size, bias, gated=config.activation),
        loader.linear({down: config.hidden_size}, inner, bias),
    )
