"""The config.json of the newer families, as the hub has them: what is read of it, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from miniserve.config import ConfigError
from miniserve.families import FAMILIES, text_model
from miniserve.hub.check import TEXT_MODELS
from miniserve.hub.resolve import presets, resolve
from miniserve.model.config import LayerConfig, ModelConfig
from miniserve.model.rope import RopeConfig

MIXTURES = ("mixtral-8x7b", "qwen3-30b-a3b", "qwen3-coder-30b-a3b", "qwen3-next-80b-a3b", "qwen3.5-35b-a3b")
NEWER = (*MIXTURES, "qwen3.5-0.8b", "gemma-3-1b", "gemma-3-4b")


def config_of(alias: str, **values: Any) -> dict[str, Any]:
    """What a preset says of its text model, with some `values` set; `...` takes one out."""
    config = text_model(presets()[alias]["config"])
    config["architectures"] = [TEXT_MODELS[config["architectures"][0]]]
    return {key: value for key, value in (config | values).items() if value is not ...}


def read(alias: str, **values: Any) -> ModelConfig:
    return ModelConfig.from_hf(config_of(alias, **values))


def test_experts_of_the_hubs_models() -> None:
    found = {alias: read(alias).experts for alias in NEWER}
    sizes = {alias: (e.count, e.chosen, e.inner, e.shared_inner, e.renormed) for alias, e in found.items() if e}
    assert sizes == {
        "mixtral-8x7b": (8, 2, 14336, 0, True),
        "qwen3-30b-a3b": (128, 8, 768, 0, True),
        "qwen3-coder-30b-a3b": (128, 8, 768, 0, True),
        "qwen3-next-80b-a3b": (512, 10, 512, 512, True),
        "qwen3.5-35b-a3b": (256, 8, 512, 512, True),
    }


def test_layers_of_the_hubs_models() -> None:
    for alias in NEWER:
        model = read(alias)
        fourth = [layer.attends for layer in model.layers] == [i % 4 == 3 for i in range(len(model.layers))]
        assert fourth == (model.delta is not None) == alias.startswith(("qwen3.5", "qwen3-next")), alias
        assert model.rotary_dim == (64 if model.delta else model.head_dim)
        assert all(layer.experts == (alias in MIXTURES) for layer in model.layers)
    for alias, window, factor in (("gemma-3-1b", 512, 1.0), ("gemma-3-4b", 1024, 8.0)):
        model = read(alias)
        assert [layer.window for layer in model.layers] == [window * (i % 6 != 5) for i in range(len(model.layers))]
        assert [layer.rope for layer in model.layers] == [int(layer.window > 0) for layer in model.layers]
        assert model.ropes == (RopeConfig(1e6, "linear" if factor != 1 else "default", factor), RopeConfig(1e4))
        assert model.tie_embeddings
        assert model.attention_scale == 1 / 16


def test_both_spellings_of_rope_and_of_layers_say_the_same() -> None:
    old = read("gemma-3-4b")
    kinds = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}, {"rope_type": "default", "rope_theta": 1e4}
    for local in (kinds[1], {}, None):
        new = {"full_attention": kinds[0], "sliding_attention": local}
        gone = dict.fromkeys(("rope_theta", "rope_scaling", "rope_local_base_freq"), ...)
        assert read("gemma-3-4b", rope_parameters=new, **gone) == old
    listed = ["full_attention" if i % 6 == 5 else "sliding_attention" for i in range(34)]
    assert read("gemma-3-4b", layer_types=listed, sliding_window_pattern=...) == old
    hybrid = read("qwen3-next-80b-a3b")
    rope = {"rope_type": "default", "rope_theta": 10000000, "partial_rotary_factor": 0.25}
    assert read("qwen3-next-80b-a3b", rope_parameters=rope, rope_theta=..., partial_rotary_factor=...) == hybrid
    listed = ["full_attention" if i % 4 == 3 else "linear_attention" for i in range(48)]
    assert read("qwen3-next-80b-a3b", layer_types=listed, full_attention_interval=...) == hybrid


def test_a_text_model_inside_another() -> None:
    whole = presets()["gemma-3-4b"]["config"] | {"vision_config": {"hidden_size": 7}, "mm_tokens_per_image": 256}
    inner = whole["text_config"] | {"architectures": ["Other"], "bos_token_id": None, "num_key_value_heads": None}
    text = text_model(whole | {"text_config": inner})
    assert (text["hidden_size"], text["model_type"], text["bos_token_id"]) == (2560, "gemma3_text", 2)
    assert text["architectures"] == ["Gemma3ForConditionalGeneration"]
    assert "vision_config" not in text
    heads = ModelConfig.from_hf(text | {"architectures": ["Gemma3ForCausalLM"]})
    assert heads.kv_heads == heads.heads
    assert text_model({"text_config": "x"}) == {"text_config": "x"}


def test_what_a_family_does_not_know_changes_nothing() -> None:
    strays = {"num_experts": 8, "shared_expert_intermediate_size": 64, "query_pre_attn_scalar": 1, "layer_types": None}
    assert read("qwen3-8b", **strays) == read("qwen3-8b")
    assert read("qwen3-30b-a3b", shared_expert_intermediate_size=64) == read("qwen3-30b-a3b")


def test_layers_without_experts() -> None:
    for values in ({"num_experts": 0}, {"mlp_only_layers": [*range(48)]}, {"decoder_sparse_step": 49}):
        model = read("qwen3-30b-a3b", **values)
        assert model.layers == (LayerConfig(),) * 48
        assert model.experts is None
    assert [layer.experts for layer in read("qwen3-30b-a3b", decoder_sparse_step=2).layers[:4]] == [False, True] * 2
    with pytest.raises(ConfigError, match="no 'intermediate_size'"):
        read("qwen3-30b-a3b", num_experts=0, intermediate_size=...)


QWEN, NEXT, GEMMA = "qwen3-30b-a3b", "qwen3-next-80b-a3b", "gemma-3-4b"
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    (QWEN, {"num_experts_per_tok": 129}, "129 experts for each token, of 128"),
    ("mixtral-8x7b", {"num_local_experts": 1}, "2 experts for each token, of 1"),
    ("mixtral-8x7b", {"intermediate_size": ...}, "no 'intermediate_size'"),
    (QWEN, {"num_experts": "128"}, "'num_experts': '128', which must be a whole number above zero"),
    (QWEN, {"moe_intermediate_size": 0.5}, "'moe_intermediate_size': 0.5"),
    (QWEN, {"norm_topk_prob": 1}, "'norm_topk_prob': 1, which must be true or false"),
    (QWEN, {"mlp_only_layers": 3}, "'mlp_only_layers': 3, which must be a list"),
    (NEXT, {"shared_expert_intermediate_size": "512"}, "'shared_expert_intermediate_size': '512'"),
    (NEXT, {"linear_num_value_heads": 24}, "24 heads of values for 16 of keys"),
    (NEXT, {"linear_conv_kernel_dim": -4}, "'linear_conv_kernel_dim': -4"),
    (NEXT, {"full_attention_interval": "4"}, "'full_attention_interval': '4'"),
    (NEXT, {"layer_types": ["linear_attention"] * 48}, "no layer with attention"),
    (NEXT, {"layer_types": ["mamba"] * 48}, "layers of the type 'mamba'; miniserve knows full_attention, sliding_"),
    (NEXT, {"layer_types": ["linear_attention"] * 47}, "47 layer_types for 48 layers"),
    (NEXT, {"layer_types": 48}, "'layer_types': 48, which must be a list"),
    (NEXT, {"partial_rotary_factor": 0.1}, "partial_rotary_factor 0.1 of heads of 256 numbers: so many must be even"),
    (NEXT, {"partial_rotary_factor": 1.5}, "partial_rotary_factor 1.5"),
    (NEXT, {"partial_rotary_factor": "x"}, "'partial_rotary_factor': 'x'"),
    (NEXT, {"rope_parameters": {"partial_rotary_factor": -1}}, "'partial_rotary_factor': -1"),
    (NEXT, {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "'yarn' is not supported"),
    (GEMMA, {"sliding_window": 0}, "'sliding_window': 0"),
    (GEMMA, {"sliding_window": 1024.5}, "'sliding_window': 1024.5"),
    (GEMMA, {"sliding_window_pattern": -6}, "'sliding_window_pattern': -6"),
    (GEMMA, {"rope_local_base_freq": "1e4"}, "'rope_local_base_freq': '1e4'"),
    (GEMMA, {"rope_scaling": {"full_attention": 8.0}}, "rope parameters 8.0 are not supported"),
    (GEMMA, {"rope_scaling": {"sliding_attention": {"rope_theta": 1e4}}}, "one set for all layers is"),
    (GEMMA, {"final_logit_softcapping": 30.0}, "caps logits"),
    (GEMMA, {"hidden_activation": ["gelu_pytorch_tanh"]}, "activation .*gelu_pytorch_tanh.*; miniserve knows silu"),
    ("qwen3-8b", {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": "1"}, "'max_window_layers'"),
]


@pytest.mark.parametrize(("alias", "values", "message"), REFUSED, ids=lambda value: str(value)[:60])
def test_what_cannot_be_is_refused_in_one_line(alias: str, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as raised:
        read(alias, **values)
    assert "\n" not in str(raised.value)


WRONG: list[Any] = [
    *("x", "", -1, 0, 1.5, 3, True, False, None, float("inf"), float("nan"), [], {}, [1], [None], {"a": 1}),
    *({"full_attention": None}, {"full_attention": {}, "sliding_attention": [1]}, ["linear_attention"] * 48),
    *({"rope_type": ["x"]}, {"rope_type": "linear", "factor": "x"}, {"partial_rotary_factor": "x"}),
]


@pytest.mark.parametrize("alias", NEWER)
def test_whatever_stands_in_config_json_is_read_or_refused(alias: str) -> None:
    keys = {"layer_types", "rope_parameters", "rope_scaling", "dtype", "use_sliding_window", "max_window_layers"}
    keys |= set(config_of(alias)) | FAMILIES[config_of(alias)["architectures"][0]].defaults.keys()
    for key in sorted(keys - {"architectures"}):
        for value in WRONG:
            said = ""
            try:
                read(alias, **{key: value})
            except ConfigError as error:
                said = str(error)
            assert "\n" not in said


@pytest.mark.parametrize(
    ("arch", "kind"),
    [
        ("GptOssForCausalLM", "gpt_oss"),
        ("DeepseekV3ForCausalLM", "deepseek_v3"),
        ("Llama4ForConditionalGeneration", "llama4"),
        ("Glm4MoeForCausalLM", "glm4_moe"),
        ("Qwen3VLForConditionalGeneration", "qwen3_vl"),
        ("Mistral3ForConditionalGeneration", "mistral3"),
        ("Gemma3nForConditionalGeneration", "gemma3n"),
    ],
)
def test_other_architectures_are_refused_in_one_line(tmp_path: Path, arch: str, kind: str) -> None:
    text = {"model_type": "llama", "num_hidden_layers": 2}
    config = {"architectures": [arch], "model_type": kind, "text_config": text}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError) as raised:
        resolve(str(tmp_path))
    served = "Llama, Mistral, Qwen2, Qwen3, Mixtral, Qwen3Moe, Qwen3Next, Qwen3_5, Qwen3_5Moe, Gemma3"
    assert str(raised.value) == f"{tmp_path} is a {arch}; miniserve serves {served} (ForCausalLM)."
