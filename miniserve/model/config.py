"""The shape of a model, from Hugging Face's config.json in its older and newer spellings."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from miniserve.config import ConfigError

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class RopeConfig:
    """Rotary positions: `theta` and, for Llama 3.1 and later, how low frequencies are stretched."""

    theta: float
    kind: str = "default"
    """`default`, `linear` or `llama3`."""
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_max_len: int = 0


@dataclass(frozen=True)
class ModelConfig:
    """The sizes and variants that the decoder needs. Sizes count numbers, `max_len` counts tokens."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    norm_eps: float
    rope: RopeConfig
    max_len: int
    tie_embeddings: bool
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    dtype: torch.dtype

    @property
    def num_parameters(self) -> int:
        """How many numbers all matrices have (norms and biases are too small to matter)."""
        heads = 2 * (self.heads + self.kv_heads) * self.head_dim
        layer = self.hidden_size * (heads + 3 * self.intermediate_size)
        return self.layers * layer + self.vocab_size * self.hidden_size * (1 if self.tie_embeddings else 2)

    @classmethod
    def from_hf(cls, config: dict[str, Any]) -> ModelConfig:
        """Read the content of config.json, with transformers' defaults for what it leaves out. Raises `ConfigError` for
        what this decoder cannot do."""
        arch = config["architectures"][0]
        mistral, qwen2, qwen3 = (arch == f"{name}ForCausalLM" for name in ("Mistral", "Qwen2", "Qwen3"))
        heads, hidden = _whole(config, "num_attention_heads"), _whole(config, "hidden_size")
        # Qwen2 has these biases always, Mistral never; Llama and Qwen3 have one key for all four.
        attention_bias = _flag(config, "attention_bias") and not (qwen2 or mistral)
        # Old files leave the heads of K and V out. With null each head has its own, in all of them.
        kv_heads = heads if "num_key_value_heads" in config else 8 if mistral else 32 if qwen2 or qwen3 else heads
        model = cls(
            vocab_size=_whole(config, "vocab_size"),
            hidden_size=hidden,
            intermediate_size=_whole(config, "intermediate_size"),
            layers=_whole(config, "num_hidden_layers"),
            heads=heads,
            kv_heads=_whole(config, "num_key_value_heads", kv_heads),
            head_dim=_whole(config, "head_dim", 128 if qwen3 else hidden // heads),
            norm_eps=_number(config, "rms_norm_eps", 1e-6),
            rope=_rope(config),
            max_len=_whole(config, "max_position_embeddings"),
            tie_embeddings=_flag(config, "tie_word_embeddings"),
            qkv_bias=attention_bias or qwen2,
            output_bias=attention_bias,
            mlp_bias=_flag(config, "mlp_bias") and arch == "LlamaForCausalLM",
            qk_norm=qwen3,
            dtype=DTYPES.get(str(config.get("dtype") or config.get("torch_dtype")), torch.bfloat16),
        )
        if heads % model.kv_heads or model.head_dim % 2:
            shape = f"{heads} heads of {model.head_dim} numbers, {model.kv_heads} of K and V"
            raise ConfigError(f"config.json has {shape}: the second must be even, the third must divide the first.")
        if (act := config.get("hidden_act", "silu")) not in ("silu", "swish"):
            raise ConfigError(f"The model uses the activation {act!r}; miniserve knows silu.")
        # Up to the window the model was trained with full attention; past it the text would differ.
        return replace(model, max_len=min(model.max_len, _window(config, arch, model.layers) or model.max_len))


def _number(config: dict[str, Any], name: str, default: float | None = None, kind: type = float) -> Any:
    """A number above zero, of the type `kind`. Raises `ConfigError`."""
    value = default if config.get(name) is None else config[name]
    if value is None:
        raise ConfigError(f"The model's config.json has no {name!r}.")
    if type(value) not in (int, kind) or not 0 < value < math.inf:
        number = "a whole number" if kind is int else "a number"
        raise ConfigError(f"The model's config.json has {name!r}: {value!r:.60}, which must be {number} above zero.")
    return value


_whole = partial(_number, kind=int)


def _flag(config: dict[str, Any], name: str) -> bool:
    value = config.get(name)
    if not isinstance(value, bool | None):
        raise ConfigError(f"The model's config.json has {name!r}: {value!r:.60}, which must be true or false.")
    return bool(value)


def _window(config: dict[str, Any], arch: str, layers: int) -> int | None:
    """How many tokens a layer sees, if one of them does not see all. Only Qwen's has a switch for it."""
    kinds, qwen = set(map(str, config.get("layer_types") or ())), arch.startswith("Qwen")
    if other := kinds - {"full_attention", "sliding_attention"}:
        raise ConfigError(f"The model has layers of the type {min(other)!r}; miniserve knows full_attention.")
    some = "sliding_attention" in kinds if kinds else not qwen or config.get("max_window_layers", 28) < layers
    if (qwen and not _flag(config, "use_sliding_window")) or not (some or arch == "MistralForCausalLM"):
        return None
    window = config.get("sliding_window", None if arch == "LlamaForCausalLM" else 4096)
    return None if window is None else _whole(config, "sliding_window", window)


def _rope(config: dict[str, Any]) -> RopeConfig:
    """From `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before)."""
    found = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(found, dict) or any(isinstance(value, dict) for value in found.values()):
        raise ConfigError(f"The model's rope parameters {found!r:.100} are not supported: one set for all layers is.")
    theta = _number(found, "rope_theta", _number(config, "rope_theta", 10000.0))
    kind = str(found.get("rope_type") or found.get("type") or "default")
    if kind in ("default", "dynamic"):  # the latter differs only past the length that the model was made for
        return RopeConfig(theta)
    if kind not in ("linear", "llama3"):
        known = "miniserve knows default, dynamic, linear, llama3. If it was added for longer contexts, take it out"
        raise ConfigError(f"The model's rope scaling {kind!r} is not supported; {known} of config.json.")
    if (part := found.get("partial_rotary_factor", config.get("partial_rotary_factor"))) not in (None, 1):
        raise ConfigError(f"The model's partial_rotary_factor {part!r} is not supported beside rope scaling {kind!r}.")
    factor = _number(found, "factor")
    if kind == "linear":
        return RopeConfig(theta, kind, factor)
    low, high = (_number(found, name) for name in ("low_freq_factor", "high_freq_factor"))
    of_old = config if config.get("original_max_position_embeddings") else found
    original = _whole(of_old, "original_max_position_embeddings", _whole(config, "max_position_embeddings"))
    return RopeConfig(theta, kind, factor, low, high, original)
