"""config.json in its older and newer spellings, and what the decoder cannot do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from miniserve.config import ConfigError
from miniserve.model.config import ModelConfig, RopeConfig
from tests.support import tiny

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "max_position_embeddings": 512,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "vocab_size": 320,
}


def read(**values: Any) -> ModelConfig:
    return ModelConfig.from_hf(LLAMA | values)


@pytest.mark.parametrize("rope_scaling", [None, "llama3", "linear"])
@pytest.mark.parametrize("arch", tiny.ARCHITECTURES)
def test_both_shapes_say_the_same(tmp_path: Path, arch: str, rope_scaling: str | None) -> None:
    found = []
    for old in (False, True):
        folder = tiny.make_model(tmp_path / f"{old}", arch, rope_scaling=rope_scaling, old_config_shape=old)
        text = (folder / "config.json").read_text()
        assert ("rope_parameters" in text, "torch_dtype" in text) == (not old, old)
        found.append(ModelConfig.from_hf(json.loads(text)))
    assert found[0] == found[1]
    assert found[0].rope.kind == (rope_scaling or "default")
    assert found[0].dtype == torch.float32


@pytest.mark.parametrize("name", ["llama", "llama3", "qwen2", "qwen3", "mistral"])
def test_parameters_are_counted(tiny_models: dict[str, Path], name: str) -> None:
    import transformers

    model = ModelConfig.from_hf(json.loads((tiny_models[name] / "config.json").read_text()))
    truth = transformers.AutoModelForCausalLM.from_pretrained(tiny_models[name])
    assert model.num_parameters == sum(p.numel() for p in truth.parameters() if p.dim() == 2)


def test_what_is_not_said_has_a_default() -> None:
    model = read()
    assert (model.kv_heads, model.head_dim, model.norm_eps) == (4, 16, 1e-6)
    assert (model.rope, model.dtype) == (RopeConfig(10000.0), torch.bfloat16)
    flags = (model.tie_embeddings, model.qkv_bias, model.output_bias, model.mlp_bias, model.qk_norm)
    assert not any(flags)


def test_biases() -> None:
    model = read(attention_bias=True, mlp_bias=True)
    assert model.qkv_bias
    assert model.output_bias
    assert model.mlp_bias
    qwen = read(architectures=["Qwen2ForCausalLM"])
    assert qwen.qkv_bias
    assert not qwen.output_bias


def test_llama3_scaling() -> None:
    model = read(rope_theta=5e5, rope_scaling=tiny.LLAMA3)
    assert model.rope == RopeConfig(5e5, "llama3", 8.0, 1.0, 4.0, 64)


@pytest.mark.parametrize(
    ("values", "max_len"),
    [
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 128}, 128),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": 4096}, 512),
        ({"architectures": ["MistralForCausalLM"], "sliding_window": None}, 512),
        ({"architectures": ["Qwen2ForCausalLM"], "sliding_window": 128, "use_sliding_window": False}, 512),
        ({"architectures": ["Qwen2ForCausalLM"], "sliding_window": 128, "use_sliding_window": True}, 128),
    ],
)
def test_a_sliding_window_ends_the_context(values: dict[str, Any], max_len: int) -> None:
    assert read(**values).max_len == max_len


@pytest.mark.parametrize("key", sorted(LLAMA.keys() - {"architectures"}))
def test_a_missing_key_is_named(key: str) -> None:
    with pytest.raises(ConfigError, match=f"no '{key}'"):
        ModelConfig.from_hf({name: value for name, value in LLAMA.items() if name != key})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hidden_act": "gelu"}, "'gelu'; miniserve knows silu"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "'yarn' is not supported"),
        ({"rope_parameters": {"rope_theta": 1e4, "rope_type": "longrope"}}, "'longrope' is not supported"),
    ],
)
def test_what_cannot_be_done_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(**values)
