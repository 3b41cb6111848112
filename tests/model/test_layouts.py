"""The newer families' weights: all layouts that they come in are the same model, and what does not fit is said."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from miniserve.config import ConfigError
from tests.support import tiny
from tests.support.engines import greedy, small
from tests.support.packed import Packed, awq, compressed, fp8, gptq, write_packed

Tensors = dict[str, torch.Tensor]
Change = Callable[[Tensors], Tensors]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    return {arch: tiny.make_model(root / arch, arch, seed=2) for arch in tiny.NEWER}


def fused(tensors: Tensors) -> Tensors:
    """All experts of a layer in one tensor, as the hub's Qwen3.5 has them."""
    out = {name: tensor for name, tensor in tensors.items() if ".experts." not in name}
    each = range(tiny.EXPERTS["num_experts"])
    for at in {name.partition(".experts.")[0] for name in tensors if ".experts." in name}:
        parts = {p: [tensors[f"{at}.experts.{i}.{p}_proj.weight"] for i in each] for p in ("gate", "up", "down")}
        halves = zip(parts["gate"], parts["up"], strict=True)
        out[f"{at}.experts.gate_up_proj"] = torch.stack([torch.cat(pair) for pair in halves])
        out[f"{at}.experts.down_proj"] = torch.stack(parts["down"])
    return out


def named(first: str, head: str = "lm_head.") -> Change:
    """The text model's tensors under the names that they have beside a tower."""
    return lambda tensors: {
        f"{first}{name.removeprefix('model.')}"
        if name.startswith("model.")
        else head + name.removeprefix("lm_head."): t
        for name, t in tensors.items()
    }


def beside(*names: str) -> Change:
    return lambda tensors: tensors | {name: torch.ones(4, 4) for name in names}


TOWER = ("model.visual.blocks.0.attn.qkv.weight", "mtp.layers.0.mlp.experts.gate_up_proj", "mtp.norm.weight")
SIGLIP = (
    "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight",
    "multi_modal_projector.mm_soft_emb_norm",
)
LAYOUTS: dict[str, tuple[str, list[Change]]] = {
    "experts in one tensor": ("qwen3_moe", [fused]),
    "Qwen3-Next with what predicts further tokens": ("qwen3_next", [fused, beside("mtp.fc.weight", TOWER[1])]),
    "Qwen3.5 of the hub": ("qwen3_5_moe", [fused, named("model.language_model."), beside(*TOWER)]),
    "Qwen3.5 with experts apart": ("qwen3_5_moe", [named("model.language_model."), beside(*TOWER)]),
    "dense Qwen3.5": ("qwen3_5", [named("language_model.model.", "language_model.lm_head."), beside(*TOWER)]),
    "Gemma 3 of the hub": ("gemma3", [named("language_model.model.", "language_model.lm_head."), beside(*SIGLIP)]),
    "Gemma 3 of transformers": (
        "gemma3",
        [named("model.language_model."), beside(f"model.{SIGLIP[0]}", f"model.{SIGLIP[1]}")],
    ),
    "Mixtral": ("mixtral", [beside("model.layers.0.self_attn.rotary_emb.inv_freq")]),
}


def laid(folder: Path, out: Path, changes: list[Change], shards: int = 1) -> Path:
    """The model in `folder` with its tensors changed; where they are a tower's neighbours, its config.json too."""
    shutil.copytree(folder, out, ignore=shutil.ignore_patterns("*.safetensors*"))
    tensors = load_file(folder / "model.safetensors")
    for change in changes:
        tensors = change(tensors)
    files: list[Tensors] = [{} for _ in range(shards)]
    for number, (name, tensor) in enumerate(sorted(tensors.items())):
        files[number % shards][name] = tensor.contiguous()
    names = (
        ["model.safetensors"]
        if shards == 1
        else [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]
    )
    for name, part in zip(names, files, strict=True):
        save_file(part, out / name, metadata={"format": "pt"})
    if shards > 1:
        index = {tensor: name for name, part in zip(names, files, strict=True) for tensor in part}
        (out / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    if any("language_model." in name for name in tensors):
        text = json.loads((out / "config.json").read_text())
        whole = text.pop("architectures")[0].replace("ForCausalLM", "ForConditionalGeneration")
        kind = text["model_type"].removesuffix("_text")
        config = {"architectures": [whole], "model_type": kind, "text_config": text, "vision_config": {"depth": 2}}
        (out / "config.json").write_text(json.dumps(config))
    return out


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("case", LAYOUTS)
def test_every_layout_is_the_same_model(
    models: dict[str, Path], tmp_path: Path, case: str, shards: int, caplog: pytest.LogCaptureFixture
) -> None:
    arch, changes = LAYOUTS[case]
    folder = laid(models[arch], tmp_path / "model", changes, shards)
    prompts = tiny.prompts(3)
    with caplog.at_level(logging.WARNING, "miniserve"):
        llm = small(folder)
        found = greedy(llm, prompts, 12)
    assert found == tiny.reference(models[arch], prompts, 12)
    assert llm._built.facts.weights_bytes == small(models[arch])._built.facts.weights_bytes
    assert not [record for record in caplog.records if record.name.startswith("miniserve")]


CT = {"weights": {"num_bits": 4, "type": "int", "symmetric": True}, "input_activations": None}
PACKED: dict[str, tuple[str, Callable[[torch.Tensor], Packed], dict[str, Any], str | tuple[str, ...]]] = {
    "FP8 in blocks": (
        "qwen3_moe",
        partial(fp8, how="block"),
        {"quant_method": "fp8", "weight_block_size": [128, 128]},
        "_proj.weight",
    ),
    "FP8 of a hybrid": ("qwen3_next", partial(fp8, how="block"), {"quant_method": "fp8"}, "_proj.weight"),
    "AWQ": ("qwen3_moe", awq, {"quant_method": "awq", "bits": 4, "version": "gemm"}, "_proj.weight"),
    "GPTQ": ("mixtral", gptq, {"quant_method": "gptq", "bits": 4}, (".w1.weight", ".w2.weight", ".w3.weight")),
    "compressed-tensors": (
        "qwen3_5_moe",
        compressed,
        {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": CT}},
        "_proj.weight",
    ),
}


@pytest.mark.parametrize("case", PACKED)
def test_packed_experts_are_the_dequantized_ones(models: dict[str, Path], tmp_path: Path, case: str) -> None:
    arch, pack, says, only = PACKED[case]
    folder = write_packed(models[arch], tmp_path / "packed", pack, says, tmp_path / "plain", only)
    prompts = tiny.prompts(2)
    assert greedy(small(folder, dtype="float32"), prompts, 12) == tiny.reference(tmp_path / "plain", prompts, 12)


def drop(end: str) -> Change:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if not name.endswith(end)}


def change(end: str, how: Callable[[torch.Tensor], torch.Tensor]) -> Change:
    return lambda tensors: {name: how(t) if name.endswith(end) else t for name, t in tensors.items()}


SPOILED: dict[str, tuple[str, list[Change], str]] = {
    "an expert is missing": (
        "qwen3_moe",
        [drop("layers.1.mlp.experts.3.up_proj.weight")],
        r"no tensor 'model.layers.1.mlp.experts.3.up_proj.weight': not complete",
    ),
    "a router is missing": ("mixtral", [drop("block_sparse_moe.gate.weight")], r"no tensor .*block_sparse_moe.gate"),
    "half of what is fused is missing": ("qwen3_moe", [fused, drop("experts.down_proj")], r"no tensor .*experts.down"),
    "an expert too few": ("qwen3_moe", [fused, change("gate_up_proj", lambda t: t[:3])], r"shape \(3, 128, 128\)"),
    "fused the other way": ("qwen3_next", [fused, change("down_proj", lambda t: t.mT)], r"has the shape \(.*says \("),
    "an expert of another size": (
        "mixtral",
        [change("experts.0.w2.weight", lambda t: t[:, :-32])],
        r"w2.weight .* has the shape \(128, 224\), but config.json says \(128, 256\)",
    ),
    "fused FP8": (
        "qwen3_moe",
        [fused, change("gate_up_proj", lambda t: t.to(torch.float8_e4m3fn))],
        r"experts.gate_up_proj in .* is torch.float8_e4m3fn without scales",
    ),
    "a gate of another size": ("qwen3_5", [change("q_proj.weight", lambda t: t[:256])], r"q_proj.* \(256, 128\)"),
    "no decay": ("qwen3_5", [drop("A_log")], r"no tensor .*linear_attn.A_log"),
    "a norm is missing": ("gemma3", [drop("0.post_feedforward_layernorm.weight")], r"no tensor .*post_feedforward"),
}  # fmt: skip


@pytest.mark.parametrize("case", SPOILED)
def test_weights_that_do_not_fit_are_refused_in_one_line(models: dict[str, Path], tmp_path: Path, case: str) -> None:
    arch, changes, message = SPOILED[case]
    folder = laid(models[arch], tmp_path / "model", changes)
    with pytest.raises(ConfigError, match=message) as raised:
        small(folder)
    assert "\n" not in str(raised.value)
