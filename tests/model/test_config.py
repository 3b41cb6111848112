"""config.json in its older and newer spellings, and what the decoder cannot do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from miniserve.config import ConfigError
from miniserve.model.config import ModelConfig
from miniserve.model.rope import RopeConfig, angles
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


QWEN = {"architectures": ["Qwen2ForCausalLM"], "sliding_window": 128, "use_sliding_window": True}


def read(**values: Any) -> ModelConfig:
    return ModelConfig.from_hf(LLAMA | {"num_key_value_heads": None} | values)


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
    assert found[0].ropes[0].kind == (rope_scaling or "default")
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
    assert (model.ropes[0], model.dtype) == (RopeConfig(10000.0), torch.bfloat16)
    flags = (model.tie_embeddings, model.qkv_bias, model.output_bias, model.mlp_bias, model.family.qk_norm)
    assert not any(flags)


def test_biases() -> None:
    model = read(attention_bias=True, mlp_bias=True)
    assert model.qkv_bias
    assert model.output_bias
    assert model.mlp_bias
    qwen = read(architectures=["Qwen2ForCausalLM"])
    assert qwen.qkv_bias
    assert not qwen.output_bias


DEFAULTS: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {"model_type": "llama"},
    "MistralForCausalLM": {"model_type": "mistral", "num_attention_heads": 8},
    "Qwen2ForCausalLM": {"model_type": "qwen2", "num_attention_heads": 32, "hidden_size": 512},
    "Qwen3ForCausalLM": {"model_type": "qwen3", "num_attention_heads": 32, "hidden_size": 512},
}
SAID: list[dict[str, Any]] = [
    {},
    {"num_key_value_heads": 2},
    {"attention_bias": True},
    {"mlp_bias": True},
    {"rope_theta": 77.0},
    {"rope_theta": 77.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
    {"rope_parameters": {"rope_theta": 9.0, "rope_type": "default"}, "rope_scaling": {"type": "linear", "factor": 2.0}},
    {"rope_scaling": {k: v for k, v in tiny.LLAMA3.items() if k != "original_max_position_embeddings"}},
    {"rope_scaling": tiny.LLAMA3, "original_max_position_embeddings": 32},
]


@pytest.mark.parametrize("said", SAID, ids=str)
@pytest.mark.parametrize("arch", DEFAULTS)
def test_what_is_left_out_or_said_twice_is_as_in_transformers(arch: str, said: dict[str, Any]) -> None:
    import transformers
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = LLAMA | DEFAULTS[arch] | {"architectures": [arch], **said}
    model = ModelConfig.from_hf(config)
    theirs = transformers.AutoConfig.for_model(**json.loads(json.dumps(config)))  # it changes what it is given
    assert model.kv_heads == theirs.num_key_value_heads
    assert model.norm_eps == theirs.rms_norm_eps
    assert model.ropes[0].theta == theirs.rope_parameters["rope_theta"]
    assert model.ropes[0].kind == theirs.rope_parameters["rope_type"]
    if model.ropes[0].kind != "default":
        frequencies, _ = ROPE_INIT_FUNCTIONS[model.ropes[0].kind](theirs, torch.device("cpu"))
        torch.testing.assert_close(angles(model.ropes[0], model.head_dim, 2)[1], frequencies)
    with torch.device("meta"):
        layer = transformers.AutoModelForCausalLM.from_config(theirs).model.layers[0]
    attention = layer.self_attn
    assert model.head_dim == attention.head_dim
    biases = [m.bias is not None for m in (attention.q_proj, attention.v_proj, attention.o_proj, layer.mlp.down_proj)]
    assert biases == [model.qkv_bias, model.qkv_bias, model.output_bias, model.mlp_bias]


def test_llama3_scaling() -> None:
    model = read(rope_theta=5e5, rope_scaling=tiny.LLAMA3)
    assert model.ropes[0] == RopeConfig(5e5, "llama3", 8.0, 1.0, 4.0, 64)


MISTRAL = {"architectures": ["MistralForCausalLM"]}
FULL, SLIDING = "full_attention", "sliding_attention"


@pytest.mark.parametrize(
    ("values", "windows"),
    [
        (MISTRAL | {"sliding_window": 128}, [128, 128]),
        (MISTRAL | {"sliding_window": None}, [0, 0]),
        (MISTRAL | {"sliding_window": 128, "use_sliding_window": False}, [128, 128]),
        (MISTRAL, [4096, 4096]),
        ({"sliding_window": 128}, [0, 0]),
        ({"sliding_window": 128, "layer_types": [FULL] * 2}, [0, 0]),
        (QWEN | {"use_sliding_window": False}, [0, 0]),
        (QWEN, [0, 0]),  # its windows begin above layer 28
        (QWEN | {"max_window_layers": 1}, [0, 128]),
        (QWEN | {"max_window_layers": 2}, [0, 0]),
        (QWEN | {"layer_types": [FULL, SLIDING]}, [0, 128]),
        (QWEN | {"layer_types": [FULL] * 2, "max_window_layers": 0}, [0, 0]),
    ],
)
def test_windows_of_layers(values: dict[str, Any], windows: list[int]) -> None:
    """As in transformers, where Llama has none whatever its file says."""
    model = read(**values)
    assert [layer.window for layer in model.layers] == windows
    assert model.max_len == LLAMA["max_position_embeddings"]


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
        ({"layer_types": ["full_attention", "linear_attention"]}, "'linear_attention'; miniserve knows full_attention"),
    ],
)
def test_what_cannot_be_done_is_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read(**values)
