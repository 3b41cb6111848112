"""The shape of a model, from Hugging Face's config.json in its older and newer spellings."""

from dataclasses import dataclass
from typing import Any, Self

import torch

from miniserve.config import ConfigError, problem
from miniserve.families import FAMILIES, Family, flag, number, whole
from miniserve.model import rope
from miniserve.ops.decoder import DeltaSizes, Sizes

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
ACTIVATIONS = {"silu": "silu", "swish": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


@dataclass(frozen=True)
class ExpertsConfig:
    """Of `count` experts of `inner` numbers `chosen` work on a token, and one of `shared_inner` numbers if that is not
    0. `renormed`: the weights of the chosen add up to 1."""

    count: int
    chosen: int
    inner: int
    shared_inner: int
    renormed: bool


@dataclass(frozen=True)
class LayerConfig:
    """What tells one layer from another: `attends` to tokens it stores, the last `window` of them (0: all) with the
    rotary table `rope`, or has a recurrent state; with `experts` or a plain MLP."""

    attends: bool = True
    window: int = 0
    rope: int = 0
    experts: bool = False


@dataclass(frozen=True)
class ModelConfig:
    """The sizes and variants that the decoder needs. Sizes count numbers, `max_len` counts tokens."""

    family: Family
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: tuple[LayerConfig, ...]
    heads: int
    kv_heads: int
    head_dim: int
    rotary_dim: int
    norm_eps: float
    ropes: tuple[rope.RopeConfig, ...]
    attention_scale: float
    max_len: int
    tie_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    activation: str
    delta: DeltaSizes | None
    experts: ExpertsConfig | None
    dtype: torch.dtype

    @property
    def kv_layers(self) -> int:
        """Layers that store keys and values; the others have a recurrent state."""
        return sum(layer.attends for layer in self.layers)

    @property
    def sizes(self) -> Sizes:
        """What kernels are chosen for."""
        windows = {layer.window for layer in self.layers if layer.attends}
        state = (self.delta.k_dim, self.delta.v_dim) if self.delta else ()
        return Sizes(self.heads, self.head_dim, self.widths, state, self.attention_scale, windows, self.kv_heads)

    @property
    def widths(self) -> list[int]:
        """Sizes of the rows that matrices are multiplied with."""
        rows = [self.hidden_size, self.heads * self.head_dim]
        rows += [self.intermediate_size] if any(not layer.experts for layer in self.layers) else []
        if self.experts:
            rows += [self.experts.inner] + [self.experts.shared_inner] * bool(self.experts.shared_inner)
        return rows + ([self.delta.v_heads * self.delta.v_dim] if self.delta else [])

    @property
    def num_parameters(self) -> int:
        """How many numbers all matrices have (norms and biases are too small to matter)."""
        q, kv, total = self.heads * self.head_dim, self.kv_heads * self.head_dim, 0
        for layer in self.layers:
            if layer.attends:
                total += self.hidden_size * ((2 + self.family.gated) * q + 2 * kv)
            elif self.delta:
                total += self.hidden_size * (self.delta.channels + 2 * self.delta.v_heads * (self.delta.v_dim + 1))
            if layer.experts and self.experts:
                inner = self.experts.count * self.experts.inner + self.experts.shared_inner
                total += self.hidden_size * (3 * inner + self.experts.count)
            else:
                total += 3 * self.hidden_size * self.intermediate_size
        return total + self.vocab_size * self.hidden_size * (1 if self.tie_embeddings else 2)

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> Self:
        """Read the content of config.json, with transformers' defaults for what it leaves out. Raises `ConfigError` for
        what this decoder cannot do."""
        arch = config["architectures"][0]
        family = FAMILIES[arch]
        # Old files leave the heads of K and V out. With null each head has its own, in all of them.
        null_heads = "num_key_value_heads" in config and config["num_key_value_heads"] is None
        given = {key: value for key, value in config.items() if value is not None or key == WINDOW}
        if "num_local_experts" in given:  # one name or the other
            given.setdefault("num_experts", given["num_local_experts"])
        config = family.defaults | given
        heads, hidden = whole(config, "num_attention_heads"), whole(config, "hidden_size")
        head_dim = whole(config, "head_dim", hidden // heads)
        attention_bias = flag(config, "attention_bias") and not family.bias
        activation = str(config.get("hidden_activation") or config.get("hidden_act", "silu"))
        if activation not in ACTIVATIONS:
            raise ConfigError(problem("model.activation", given=activation, known=", ".join(ACTIVATIONS)))
        layers, ropes = _layers(config, family), rope.read(config)
        needed = any(not layer.experts for layer in layers)
        model = cls(
            family=family,
            vocab_size=whole(config, "vocab_size"),
            hidden_size=hidden,
            intermediate_size=whole(config, "intermediate_size", None if needed else 1),
            layers=layers,
            heads=heads,
            kv_heads=heads if null_heads else whole(config, "num_key_value_heads", heads),
            head_dim=head_dim,
            rotary_dim=int(head_dim * ropes[0].part) if rope.PARTIAL in family.defaults else head_dim,
            norm_eps=number(config, "rms_norm_eps", 1e-6),
            ropes=ropes,
            attention_scale=number(config if SCALAR in family.defaults else {}, SCALAR, head_dim) ** -0.5,
            max_len=whole(config, "max_position_embeddings"),
            tie_embeddings=flag(config, "tie_word_embeddings"),
            qkv_bias=attention_bias or family.bias == "always",
            output_bias=attention_bias,
            mlp_bias=flag(config, "mlp_bias") and arch == "LlamaForCausalLM",
            activation=ACTIVATIONS[activation],
            delta=None if all(layer.attends for layer in layers) else _delta(config),
            experts=_experts(config, family) if any(layer.experts for layer in layers) else None,
            dtype=DTYPES.get(str(config.get("dtype") or config.get("torch_dtype")), torch.bfloat16),
        )
        if heads % model.kv_heads or model.head_dim % 2:
            raise ConfigError(problem("model.heads", heads=heads, dim=model.head_dim, kv=model.kv_heads))
        if model.rotary_dim % 2 or not 0 < model.rotary_dim <= head_dim:
            raise ConfigError(problem("model.rotary", name=rope.PARTIAL, part=ropes[0].part, dim=head_dim))
        if family.scaled and (config.get("final_logit_softcapping") or config.get("attn_logit_softcapping")):
            raise ConfigError("config.json caps logits (softcapping), which miniserve does not.")
        if not model.kv_layers:
            raise ConfigError("config.json has no layer with attention: miniserve serves models with some.")
        return model


WINDOW, SCALAR = "sliding_window", "query_pre_attn_scalar"
INNER = "moe_intermediate_size"
KINDS = (*rope.ATTENTIONS, "linear_attention")


def _layers(config: dict[str, Any], family: Family) -> tuple[LayerConfig, ...]:
    """Of each layer whether it attends, how far it looks, and whether it has experts."""
    count, kinds = whole(config, "num_hidden_layers"), config.get("layer_types")
    window = whole(config, WINDOW) if family.windows and config.get(WINDOW) is not None else 0
    step, dense = whole(config, "decoder_sparse_step", 1), config.get("mlp_only_layers") or []
    every = next((name for name in ("sliding_window_pattern", "full_attention_interval") if config.get(name)), None)
    if family.windows == "all":
        kinds = [KINDS[1]] * count
    elif family.windows == "typed" and "max_window_layers" in family.defaults:  # Qwen's has a switch
        window = window if flag(config, "use_sliding_window") else 0
        first = whole(config, "max_window_layers") if config["max_window_layers"] != 0 else 0
        kinds = kinds or [KINDS[i >= first] for i in range(count)]
    elif kinds is None and every:
        full, other = whole(config, every), KINDS[1 if family.windows else 2]
        kinds = [KINDS[0] if (i + 1) % full == 0 else other for i in range(count)]
    kinds = [KINDS[0]] * count if kinds is None else kinds
    for name, listed in (("layer_types", kinds), ("mlp_only_layers", dense)):
        if not isinstance(listed, list):
            raise ConfigError(f"The model's config.json has {name!r}: {listed!r:.60}, which must be a list.")
    if len(kinds) != count:
        raise ConfigError(f"config.json has {len(kinds)} layer_types for {count} layers.")
    known = KINDS if "linear_num_key_heads" in family.defaults else KINDS[:2]
    if other_kinds := {*map(str, kinds)} - {*known}:
        raise ConfigError(f"The model has layers of the type {min(other_kinds)!r}; miniserve knows {', '.join(known)}.")
    return tuple(
        LayerConfig(
            attends=kind != KINDS[2],
            window=window if kind == KINDS[1] else 0,
            rope=int(kind == KINDS[1] and "rope_local_base_freq" in family.defaults),
            experts=bool(family.experts and config["num_experts"]) and (i + 1) % step == 0 and i not in dense,
        )
        for i, kind in enumerate(kinds)
    )


def _experts(config: dict[str, Any], family: Family) -> ExpertsConfig:
    """Mixtral's experts are as large as an MLP."""
    shared = "shared_expert_intermediate_size"
    sizes = ExpertsConfig(
        count=whole(config, "num_experts"),
        chosen=whole(config, "num_experts_per_tok"),
        inner=whole(config, INNER if INNER in family.defaults else "intermediate_size"),
        shared_inner=whole(config, shared) if shared in family.defaults and config[shared] else 0,
        renormed=flag(config, "norm_topk_prob"),
    )
    if sizes.chosen > sizes.count:
        raise ConfigError(f"config.json has {sizes.chosen} experts for each token, of {sizes.count}.")
    return sizes


def _delta(config: dict[str, Any]) -> DeltaSizes:
    names = "num_key_heads", "num_value_heads", "key_head_dim", "value_head_dim", "conv_kernel_dim"
    sizes = DeltaSizes(*(whole(config, f"linear_{name}") for name in names))
    if sizes.v_heads % sizes.k_heads:
        raise ConfigError(f"config.json has {sizes.v_heads} heads of values for {sizes.k_heads} of keys.")
    return sizes
