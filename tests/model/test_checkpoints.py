"""Safetensors of few bits served as they are: what each format means, that models of them are those models, and what is
refused."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from miniserve.config import ConfigError
from miniserve.hub.check import check_folder
from miniserve.hub.resolve import resolve
from miniserve.model.checkpoints import Safetensors, checked
from miniserve.ops.quantized import Quantized, dense
from tests.support import tiny
from tests.support.engines import KERNELS, greedy, small
from tests.support.packed import Packed, awq, compressed, fp8, gptq, write_packed


class Open:
    """An open file of safetensors."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        self.tensors = tensors

    def keys(self) -> list[str]:
        return list(self.tensors)

    def get_tensor(self, name: str) -> torch.Tensor:
        return self.tensors[name].contiguous()


def read(parts: dict[str, torch.Tensor], shape: tuple[int, ...], **says: Any) -> tuple[Any, Counter[str], Safetensors]:
    widened = Counter[str]()
    source = Safetensors(Path(), [Open({f"model.x.{end}": tensor for end, tensor in parts.items()})], says, widened)
    assert source.names == {"model.x.weight"} | {f"model.x.{end}" for end in parts if end not in CHANGED}
    return checked(source.read, Path(), "model.x.weight", shape), widened, source


CHANGED = ("weight", "qweight", "weight_packed")
PACKERS: dict[str, tuple[Callable[..., Packed], dict[str, str]]] = {
    "awq": (awq, {}),
    "gptq": (gptq, {}),
    "gptq_v2": (partial(gptq, less=0), {"checkpoint_format": "gptq_v2"}),
    "compressed": (compressed, {}),
}


@given(
    st.integers(0, 1000),
    st.sampled_from(sorted(PACKERS)),
    st.sampled_from([4, 8]),
    st.booleans(),
    st.sampled_from([16, 32, 64, 96, 192]),
    st.sampled_from([8, 24, 40]),
)
def test_packed_numbers_are_what_they_mean(
    seed: int, name: str, bits: int, symmetric: bool, group: int, rows: int
) -> None:
    pack, says = PACKERS[name]
    bits = 4 if name == "awq" else bits
    weight = torch.randn(rows, 192, generator=torch.Generator().manual_seed(seed))
    parts, meant = pack(weight, bits=bits, group=group, symmetric=symmetric)
    made, widened, source = read(parts, (rows, 192), **says)
    torch.testing.assert_close(dense(made, torch.float32), meant, rtol=0, atol=1e-6)
    assert not source.unread
    stays = group % 32 == 0 and (symmetric or bits == 4)
    assert isinstance(made, Quantized) == stays == (not widened)
    if isinstance(made, Quantized):
        assert made.bits == bits
        assert (made.minimums is None) == symmetric
        assert all(p is None or p.is_contiguous() for p in (made.codes, made.scales, made.minimums))


@given(
    st.integers(0, 1000),
    st.sampled_from(["tensor", "channel", "block"]),
    st.sampled_from([40, 128, 200]),
    st.sampled_from([64, 128, 300]),
)
def test_fp8_is_dequantized(seed: int, how: str, rows: int, width: int) -> None:
    weight = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))
    parts, meant = fp8(weight, how)
    made, widened, _ = read(parts, (rows, width))
    torch.testing.assert_close(made, meant, rtol=1e-6, atol=0)
    assert widened == {"FP8": 1}


def test_int8_of_compressed_tensors_is_served() -> None:
    codes = torch.randint(-128, 128, (8, 64), dtype=torch.int8)
    scales = torch.linspace(0.01, 0.5, 8).bfloat16().unsqueeze(1)
    made, _, _ = read({"weight": codes, "weight_scale": scales}, (8, 64))
    assert isinstance(made, Quantized)
    assert torch.equal(made.dequantized(torch.float32), codes.float() * scales.half().float())


def test_what_is_no_such_weight_is_refused() -> None:
    weight = torch.randn(8, 64)
    parts, _ = gptq(weight)
    with pytest.raises(ConfigError, match=r"another order .*act-order"):
        read(parts | {"g_idx": parts["g_idx"].flip(0)}, (8, 64))
    with pytest.raises(ConfigError, match=r"scales .* not finite in fp16"):
        read({"weight": weight.to(torch.int8), "weight_scale": torch.full((8, 1), 1e6)}, (8, 64))
    for changed in (parts["scales"][:, :-1], parts["scales"] * torch.inf):  # the first are too few for the kernel
        with pytest.raises(ConfigError, match=r"scales .* too few, too many, or not finite in fp16"):
            read(parts | {"scales": changed}, (8, 64))
    parts, _ = awq(weight)
    with pytest.raises(ConfigError, match="not finite in fp16"):  # of a scale, but not of its product with a zero point
        read(parts | {"scales": parts["scales"] * 0 + 6e4}, (8, 64))
    flat = [("scales", parts["scales"].flatten())]
    for end, changed in [*flat, *((end, parts[end][:0]) for end in parts)]:
        with pytest.raises(ConfigError, match=r"cannot be read \(.*: the file is damaged|the shape"):
            read(parts | {end: changed}, (8, 64))
    packed, _ = fp8(weight)
    for scales in (torch.ones(2), torch.ones(0)):
        with pytest.raises(ConfigError, match=r"cannot be read \(\d scales for 8 rows"):
            read(packed | {"weight_scale": scales}, (8, 64))
    for wrong in (weight.to(torch.float8_e4m3fn), weight.to(torch.int8), weight.int()):
        with pytest.raises(ConfigError, match=r"is torch.* without scales"):
            read({"weight": wrong}, (8, 64))
    with pytest.raises(ConfigError, match=r"the shape \(8, 64\), but config.json says \(8, 128\)"):
        read({"weight": weight}, (8, 128))


# --- models ---------------------------------------------------------------------------------------------------------


def ct(bits: int, kind: str = "int", form: str = "pack-quantized", **weights: Any) -> dict[str, Any]:
    group = {"weights": {"num_bits": bits, "type": kind, "symmetric": True, **weights}, "input_activations": None}
    return {"quant_method": "compressed-tensors", "format": form, "config_groups": {"group_0": group}}


MODELS: dict[str, tuple[str, Callable[[torch.Tensor], Packed], dict[str, Any], str]] = {
    "AWQ": ("llama", awq, {"quant_method": "awq", "bits": 4, "version": "gemm"}, "4-bit (awq)"),
    "GPTQ": ("qwen2", gptq, {"quant_method": "gptq", "bits": 4, "desc_act": True}, "4-bit (gptq)"),
    "GPTQ of 8 bits": (
        "llama3",
        partial(gptq, bits=8, less=0, group=128),
        {"quant_method": "gptq", "bits": 8, "checkpoint_format": "gptq_v2"},
        "8-bit (gptq)",
    ),
    "compressed-tensors": ("qwen3", compressed, ct(4), "4-bit (compressed-tensors)"),
    "compressed-tensors with zero points": (
        "mistral",
        partial(compressed, symmetric=False, group=64),
        ct(4, symmetric=False),
        "4-bit (compressed-tensors)",
    ),
    "compressed-tensors of 8 bits": (
        "llama",
        partial(compressed, bits=8, group=0),
        ct(8),
        "8-bit (compressed-tensors)",
    ),
    "FP8": (
        "llama",
        partial(fp8, how="block"),
        {"quant_method": "fp8", "weight_block_size": [128, 128]},
        "FP8, dequantized",
    ),
    "FP8 of compressed-tensors": (
        "qwen2",
        partial(fp8, how="channel"),
        ct(8, "float", "float-quantized"),
        "FP8, dequantized",
    ),
}


@pytest.mark.parametrize("case", MODELS)
def test_greedy_text_is_that_of_the_dequantized_weights(
    tiny_models: dict[str, Path], tmp_path: Path, case: str, caplog: pytest.LogCaptureFixture
) -> None:
    arch, pack, says, called = MODELS[case]
    folder = write_packed(tiny_models[arch], tmp_path / "packed", pack, says, tmp_path / "plain")
    assert resolve(str(folder)).source.endswith(called)
    prompts = tiny.prompts(3)
    truth = tiny.reference(tmp_path / "plain", prompts, 24)
    with caplog.at_level(logging.WARNING, "miniserve"):
        for kernels in KERNELS:
            assert greedy(small(folder, dtype="float32", cpu_kernels=kernels), prompts, 24) == truth
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("miniserve")]
    assert all("(FP8) are served as float32: a step reads" in line for line in lines)
    assert bool(lines) == ("FP8" in case)


def test_the_head_may_be_packed_and_modules_may_be_left_plain(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    says = {"quant_method": "gptq", "bits": 4, "modules_to_not_convert": ["what", "is", "there", "counts"]}
    folder = write_packed(tiny_models["llama3"], tmp_path / "packed", gptq, says, tmp_path / "plain", "head.weight")
    prompts = tiny.prompts(2)
    truth = tiny.reference(tmp_path / "plain", prompts, 16)
    for kernels in KERNELS:
        assert greedy(small(folder, dtype="float32", cpu_kernels=kernels), prompts, 16) == truth


def test_parts_of_a_matrix_may_differ(tiny_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_packed(tiny_folder, tmp_path / "packed", compressed, ct(4), tmp_path / "plain", "q_proj.weight")
    prompts = tiny.prompts(2)
    assert greedy(small(folder), prompts, 16) == tiny.reference(tmp_path / "plain", prompts, 16)
    assert "2 tensors (parts of a matrix whose others are in another format)" in caplog.text


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "awq of another layout": ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "awq gemv, 4 bits"),
    "3 bits": ({"quant_method": "gptq", "bits": 3}, "gptq, 3 bits"),
    "marlin": ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "marlin, 4 bits"),
    "NF4": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
    "EXL2": ({"quant_method": "exl2", "bits": 4.0}, "exl2"),
    "NVFP4": (ct(4, "float", "nvfp4-pack-quantized"), "compressed-tensors, nvfp4-pack-quantized"),
    "sparse": (ct(4, form="marlin-24"), "compressed-tensors, marlin-24, 4 bits"),
    "2 bits": (ct(2), "compressed-tensors, pack-quantized"),
    "no groups": ({"quant_method": "compressed-tensors"}, "compressed-tensors"),
    "other blocks": ({"quant_method": "fp8", "weight_block_size": [64, 64]}, "fp8"),
    "a list": ([], "quantization_config"),
}
w8a8 = ct(8, form="int-quantized")
w8a8["config_groups"]["group_0"]["input_activations"] = {"num_bits": 8, "type": "int"}
REFUSED["rounded activations"] = (w8a8, "compressed-tensors, int-quantized, integer activations, 8 bits")


@pytest.mark.parametrize("case", REFUSED)
def test_another_packing_is_refused_by_its_name(tiny_folder: Path, tmp_path: Path, case: str) -> None:
    says, name = REFUSED[case]
    folder = write_packed(tiny_folder, tmp_path / "m", compressed, says or [says], tmp_path / "plain")
    with pytest.raises(ConfigError, match="which is not served: miniserve serves int4 and int8") as refused:
        check_folder(folder, dummy=False)
    assert f"is quantized ({name})" in str(refused.value)


def test_quantization_may_name_the_method_that_the_model_has(tiny_folder: Path, tmp_path: Path) -> None:
    says = {"quant_method": "awq", "bits": 4}
    folder = write_packed(tiny_folder, tmp_path / "packed", awq, says, tmp_path / "plain")
    built = [small(folder, quantization=how)._built.layout for how in (None, "awq", "awq_marlin")]
    assert len(set(built)) == 1
    with pytest.raises(ConfigError, match=r"quantized already \(awq\), so it cannot be int4"):
        small(folder, quantization="int4")


def test_the_estimate_is_no_less_than_the_weights(tiny_folder: Path, tmp_path: Path) -> None:
    """It decides before they are read how much of the memory is left."""
    from miniserve.model.config import ModelConfig
    from miniserve.worker.sizing import weight_bytes

    folder = write_packed(tiny_folder, tmp_path / "packed", awq, {"quant_method": "awq", "bits": 4}, tmp_path / "plain")
    found = check_folder(folder, dummy=False)
    model = ModelConfig.from_hf(json.loads((folder / "config.json").read_text()))
    estimate = weight_bytes(model, torch.float32, *found.bits)
    loaded = small(folder, dtype="float32")._built.facts.weights_bytes
    assert loaded * 0.95 < estimate < loaded * 1.05


def test_packed_tensors_that_config_does_not_speak_of_are_refused(tiny_folder: Path, tmp_path: Path) -> None:
    folder = write_packed(tiny_folder, tmp_path / "m", gptq, {"quant_method": "gptq", "bits": 4}, tmp_path / "plain")
    tiny.edit_json(folder / "config.json", quantization_config=None)
    with pytest.raises(ConfigError, match=r"GPTQ or AWQ: it has tensors named \*\.qweight"):
        check_folder(folder, dummy=False)
    tensors = load_file(folder / "model.safetensors")
    save_file({name: tensor for name, tensor in tensors.items() if "q_proj" not in name}, folder / "model.safetensors")
    tiny.edit_json(folder / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(ConfigError, match=r"no tensor 'model.layers.0.self_attn.q_proj.weight'"):
        small(folder)
