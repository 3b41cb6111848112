"""What a rank has of a model's tensors: the parts of all ranks are the whole."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from miniserve.config import ConfigError
from miniserve.hub.resolve import presets
from miniserve.model.config import ModelConfig
from miniserve.model.loader import random
from miniserve.model.shards import Shard
from miniserve.ops.quantized import Quantized
from tests.model.test_families import config_of, read


def whole(**changes) -> ModelConfig:
    """A small hybrid model."""
    made = read("qwen3-next-80b-a3b")
    assert made.delta
    assert made.experts
    return replace(made, **{"vocab_size": 1001, "heads": 8, "kv_heads": 2, "head_dim": 4} | changes)


def parts(name: str, tensor, shape: tuple[int, ...], ranks: int, model: ModelConfig) -> list:
    def stored(asked: str, size: tuple[int, ...]):
        assert (asked, size) == (name, tuple(tensor.shape))
        return tensor

    return [Shard(model, rank, ranks).read(stored, name, shape) for rank in range(ranks)]


@pytest.mark.parametrize(
    ("name", "axis"),
    [("mlp.gate_proj.weight", 0), ("self_attn.q_proj.bias", 0), ("o_proj.weight", 1), ("w2.weight", 1)],
)
@pytest.mark.parametrize("ranks", [2, 4])
def test_rows_and_columns(name: str, axis: int, ranks: int) -> None:
    tensor = torch.randn(16, 64) if name.endswith("weight") else torch.randn(16)
    shape = [*tensor.shape]
    shape[axis] //= ranks
    found = parts(name, tensor, tuple(shape), ranks, whole())
    assert torch.equal(torch.cat(found, axis), tensor)


def test_a_bias_that_is_added_once() -> None:
    bias = torch.randn(6)
    found = parts("self_attn.o_proj.bias", bias, (6,), 3, whole())
    assert torch.equal(sum(found[1:], found[0]), bias)


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_fewer_heads_of_keys_than_ranks_are_on_several(ranks: int) -> None:
    model, tensor = whole(kv_heads=2), torch.arange(8 * 3).view(8, 3)
    found = parts("k_proj.weight", tensor, (4, 3), ranks, model)
    for rank, part in enumerate(found):
        head = rank * 2 // ranks
        assert torch.equal(part, tensor[4 * head : 4 * head + 4])
        assert Shard(model, rank, ranks).config.kv_heads == 1


def test_runs_are_divided_each() -> None:
    model = whole()
    keys, values = model.delta.k_heads * model.delta.k_dim, model.delta.v_heads * model.delta.v_dim
    tensor = torch.arange(2 * keys + values).view(-1, 1, 1)
    found = parts("linear_attn.conv1d.weight", tensor, (model.delta.channels // 2, 1, 1), 2, model)
    for start, size in ((0, keys), (keys, keys), (2 * keys, values)):
        both = [part[start // 2 : (start + size) // 2] for part in found]
        assert torch.equal(torch.cat(both), tensor[start : start + size])
    experts = torch.arange(2 * 8 * 3).view(2, 8, 3)
    found = parts("mlp.experts.gate_up_proj", experts, (2, 4, 3), 2, model)
    assert torch.equal(found[1], experts[:, [2, 3, 6, 7]])
    found = parts("mlp.experts.down_proj", experts, (2, 8, 1), 3, model)
    assert torch.equal(torch.cat(found, 2), experts)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantized_weights_are_cut_between_groups(bits: int) -> None:
    weight = Quantized.of(torch.randn(8, 128), bits)
    weight = weight.lifted() if bits == 4 else weight
    for name, shape, axis in (("down_proj.weight", (8, 64), 1), ("up_proj.weight", (4, 128), 0)):
        found = parts(name, weight, shape, 2, whole())
        assert all(part.codes.is_contiguous() and part.scales.is_contiguous() for part in found)
        plain = [part.dequantized(torch.float32) for part in found]
        assert torch.equal(torch.cat(plain, axis), weight.dequantized(torch.float32))
    with pytest.raises(ConfigError, match=r"down_proj.weight .* rows of 128 .* groups of 32.* parts of 16"):
        parts("down_proj.weight", weight, (8, 16), 8, whole())


def test_what_all_ranks_have() -> None:
    for name in ("mlp.gate.weight", "mlp.shared_expert_gate.weight", "input_layernorm.weight", "q_norm.weight"):
        tensor = torch.randn(4, 4)
        assert all(torch.equal(part, tensor) for part in parts(name, tensor, (4, 4), 2, whole()))


@pytest.mark.parametrize("ranks", [1, 2])
def test_random_weights_are_made_on_their_device(ranks: int) -> None:
    """Nothing of them on the CPU, from where 16 GB would have to come; a device that only knows shapes stands for a
    GPU."""
    model = whole()
    made, same = random(model, torch.device("meta")), random(model, torch.device("cpu"))
    shapes = {"input_layernorm.weight": (8,), "o_proj.weight": (1500, 1000)}
    shapes |= {"q_proj.bias": (8,), "in_proj_qkv.weight": (Shard(model, 0, ranks).config.delta.channels, 16)}
    for name, shape in shapes.items():
        found = Shard(model, 0, ranks).read(made, name, shape)
        assert found.device.type == "meta"
        wanted = Shard(model, 0, ranks).read(same, name, shape)
        assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype) == (shape, model.dtype)


def test_the_rows_of_a_head_that_does_not_divide() -> None:
    weight = torch.arange(10).view(10, 1)
    found = torch.cat([Shard(whole(), rank, 4).head(weight) for rank in range(4)])
    assert found.flatten().tolist() == [*range(10), 9, 9]


def test_sizes_that_do_not_divide_are_named() -> None:
    assert Shard(read("qwen3-30b-a3b"), 0, 8).config.kv_heads == 1
    with pytest.raises(ConfigError, match=r"-size 3 does not divide 8 heads, .*16 heads of keys.*: use 1, 2, 4, 8"):
        _ = Shard(whole(), 0, 3).config
    smollm2 = ModelConfig.from_hf(config_of("smollm2-135m"))
    with pytest.raises(ConfigError, match=r"2 does not divide 9 heads, 3 heads of K and V of this model: use 1, 3"):
        _ = Shard(smollm2, 0, 2).config


def test_every_preset_is_divided_or_says_how() -> None:
    for alias in presets():
        model, size = read(alias), 0
        for ranks in (1, 2, 4):
            if model.heads % ranks:
                with pytest.raises(ConfigError, match=r": use 1, (3|7)"):
                    _ = Shard(model, 0, ranks).config
                continue
            part = Shard(model, 0, ranks).config
            size = part.num_parameters if ranks == 1 else size
            assert part.num_parameters <= size
