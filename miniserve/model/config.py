"""The shape of a model, from Hugging Face's config.json in its older and newer spellings."""

from __future__ import annotations

from dataclasses import dataclass, replace
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
        """Read the content of config.json. Raises `ConfigError` for what this decoder cannot do."""
        arch = config["architectures"][0]
        try:
            heads = int(config["num_attention_heads"])
            hidden = int(config["hidden_size"])
            # Qwen2 has these biases always and has no key for them; Llama and Qwen3 have one key for all four.
            attention_bias = bool(config.get("attention_bias", False))
            qwen2 = arch == "Qwen2ForCausalLM"
            model = cls(
                vocab_size=int(config["vocab_size"]),
                hidden_size=hidden,
                intermediate_size=int(config["intermediate_size"]),
                layers=int(config["num_hidden_layers"]),
                heads=heads,
                kv_heads=int(config.get("num_key_value_heads") or heads),
                head_dim=int(config.get("head_dim") or hidden // heads),
                norm_eps=float(config.get("rms_norm_eps", 1e-6)),
                rope=_rope(config),
                max_len=int(config["max_position_embeddings"]),
                tie_embeddings=bool(config.get("tie_word_embeddings", False)),
                qkv_bias=attention_bias or qwen2,
                output_bias=attention_bias,
                mlp_bias=bool(config.get("mlp_bias", False)),
                qk_norm=arch == "Qwen3ForCausalLM",
                dtype=DTYPES.get(str(config.get("dtype") or config.get("torch_dtype")), torch.bfloat16),
            )
        except KeyError as error:
            raise ConfigError(f"The model's config.json has no {error.args[0]!r}.") from error
        if (act := config.get("hidden_act", "silu")) not in ("silu", "swish"):
            raise ConfigError(f"The model uses the activation {act!r}; miniserve knows silu.")
        windowed = config.get("use_sliding_window", arch == "MistralForCausalLM")
        window = config.get("sliding_window") if windowed else None
        if window is not None and window < model.max_len:
            # Up to the window the model was trained with full attention; past it the text would differ.
            model = replace(model, max_len=int(window))
        return model


def _rope(config: dict[str, Any]) -> RopeConfig:
    """From `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling` (before)."""
    found = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    theta = float(found.get("rope_theta") or config.get("rope_theta") or 10000.0)
    kind = str(found.get("rope_type") or found.get("type") or "default")
    if kind == "default":
        return RopeConfig(theta)
    if kind == "linear":
        return RopeConfig(theta, kind, float(found["factor"]))
    if kind == "llama3":
        factor, low, high = (float(found[name]) for name in ("factor", "low_freq_factor", "high_freq_factor"))
        return RopeConfig(theta, kind, factor, low, high, int(found["original_max_position_embeddings"]))
    raise ConfigError(f"The model's rope scaling {kind!r} is not supported; miniserve knows default, linear, llama3.")
