"""Weights of 4 and 8 bits made from plain ones: how near they are, and that a model of them is that model."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from miniserve.config import ConfigError, parse_quantization
from miniserve.ops.quantized import GROUP, Quantized
from miniserve.worker.sizing import check_quantization
from tests.support import tiny
from tests.support.engines import KERNELS, greedy, small


def weights(seed: int, rows: int, groups: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Rows of very different sizes, one of zeros."""
    generator = torch.Generator().manual_seed(seed)
    made = torch.randn(rows, groups * GROUP, generator=generator) * torch.logspace(-3, 2, rows).unsqueeze(1)
    made[0] = 0
    return made.to(dtype)


@given(st.integers(0, 1000), st.integers(1, 5), st.integers(1, 4), st.sampled_from([torch.float32, torch.bfloat16]))
def test_8_bits_are_off_by_half_a_step(seed: int, rows: int, groups: int, dtype: torch.dtype) -> None:
    weight = weights(seed, rows, groups, dtype)
    made = Quantized.of(weight, 8)
    assert made.codes.dtype == torch.int8
    assert made.codes.is_contiguous()
    assert made.scales.is_contiguous()
    assert made.minimums is None
    step = made.scales.float().repeat_interleave(GROUP, 1)
    # The scale is rounded to 11 bits: the largest code is off by up to a sixteenth more.
    assert ((made.dequantized(torch.float32) - weight.float()).abs() <= 0.57 * step + 1e-7).all()


@given(st.integers(0, 1000), st.integers(1, 5), st.integers(1, 4))
def test_4_bits_are_no_worse_than_with_the_peak_at_minus_8(seed: int, rows: int, groups: int) -> None:
    weight = weights(seed, rows, groups)
    made = Quantized.of(weight, 4)
    assert made.codes.amin() >= -8
    assert made.codes.amax() <= 7
    assert made.minimums is None
    split = weight.view(rows, groups, GROUP)
    peak = split.gather(-1, split.abs().argmax(-1, keepdim=True)) / -8
    simple = (split / peak.where(peak != 0, 1)).round().clamp(-8, 7) * peak
    errors = [(other - split).square().sum(-1) for other in (made.dequantized(torch.float32).view_as(split), simple)]
    assert (errors[0] <= errors[1] * 1.001 + 1e-12).all()


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("peak", [1e-37, 1e-38, 1e-40])
def test_numbers_near_the_least_of_all_become_zero(bits: int, peak: float) -> None:
    """The inverse of their scale is infinite, and times zero no number."""
    weight = torch.zeros(1, GROUP, dtype=torch.bfloat16)
    weight[0, 3] = peak
    assert torch.equal(Quantized.of(weight, bits).dequantized(torch.float32), torch.zeros(1, GROUP))


@given(st.integers(0, 1000), st.sampled_from([4, 8]))
def test_numbers_that_are_whole_steps_stay_as_they_are(seed: int, bits: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (3, 2 * GROUP), generator=generator)
    codes.view(3, 2, GROUP)[..., 0] = -8 if bits == 4 else 127
    if bits == 8:
        codes.clamp_(-127)
    weight = codes * 0.25
    assert torch.equal(Quantized.of(weight, bits).dequantized(torch.float32), weight)


@given(st.integers(0, 1000), st.lists(st.booleans(), min_size=1, max_size=4))
def test_rows_of_several_weights_are_one(seed: int, with_minimums: list[bool]) -> None:
    parts = [Quantized.of(weights(seed + i, 2, 3), 4) for i in range(len(with_minimums))]
    parts = [part.lifted() if lift else part for part, lift in zip(parts, with_minimums, strict=True)]
    whole = Quantized.cat(parts)
    assert (whole.minimums is not None) == any(with_minimums)
    assert torch.equal(whole.dequantized(torch.float32), torch.cat([part.dequantized(torch.float32) for part in parts]))
    assert whole.nbytes == whole.codes.numel() // 2 + 2 * whole.scales.numel() * (1 + any(with_minimums))


# --- models ---------------------------------------------------------------------------------------------------------


MATRICES = re.compile(r"(_proj|\.w\d|\.in_proj_(qkvz?|z))\.weight$")


def dequantized(folder: Path, to: Path, bits: int) -> Path:
    """The model whose plain weights are those that --quantization makes, with a head of its own."""
    to.mkdir()
    for path in folder.iterdir():
        if "safetensors" not in path.name:
            (to / path.name).write_bytes(path.read_bytes())
    tensors = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
    head = tensors.get("lm_head.weight", tensors["model.embed_tokens.weight"])
    made = {
        name: Quantized.of(tensor, bits).dequantized(torch.float32) if MATRICES.search(name) else tensor
        for name, tensor in tensors.items()
    }
    made["lm_head.weight"] = Quantized.of(head, 8).dequantized(torch.float32)
    save_file(made, to / "model.safetensors", metadata={"format": "pt"})
    tiny.edit_json(to / "config.json", tie_word_embeddings=False)
    return to


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("arch", tiny.KINDS)
def test_greedy_text_is_that_of_the_dequantized_weights(
    tiny_models: dict[str, Path], newer_models: dict[str, Path], tmp_path: Path, arch: str, bits: int
) -> None:
    prompts, folder = tiny.prompts(3), (tiny_models | newer_models)[arch]
    truth = tiny.reference(dequantized(folder, tmp_path / "plain", bits), prompts, 24)
    for kernels in KERNELS:
        llm = small(folder, quantization=f"int{bits}", dtype="float32", cpu_kernels=kernels)
        assert greedy(llm, prompts, 24) == truth


def test_pages_of_workers_that_quantize_differently_do_not_mix(tiny_folder: Path) -> None:
    built = [small(tiny_folder, quantization=how, cpu_kernels=KERNELS[-1])._built for how in (None, "int8", "int4")]
    assert len({made.layout for made in built}) == 3
    sizes = [made.weights_bytes for made in built]
    assert sizes == sorted(sizes, reverse=True)


def test_what_cannot_be_quantized_is_said(tiny_folder: Path, tmp_path: Path) -> None:
    narrow = tiny.make_model(tmp_path / "narrow", "llama", hidden=48, heads=2, kv_heads=2)
    with pytest.raises(ConfigError, match=r"32 numbers of a row together, .* have 48"):
        small(narrow, quantization="int4")
    with pytest.raises(ConfigError, match=r"--quantization awq: .* not quantized"):
        small(tiny_folder, quantization="awq")
    with pytest.raises(ConfigError, match="'int3' is not int8, int4 or"):
        small(tiny_folder, quantization="int3")
    with pytest.raises(ConfigError, match="quantized already"):
        check_quantization("int4", "awq")


@pytest.mark.parametrize(("text", "means"), [("INT4", "int4"), ("None", None), ("gptq_marlin", "gptq")])
def test_how_it_is_written(text: str, means: str | None) -> None:
    assert parse_quantization(text) == means
