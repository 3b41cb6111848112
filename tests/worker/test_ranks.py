"""A model divided among ranks is that model: greedy text equals transformers', whatever the engine does in between."""

from __future__ import annotations

from pathlib import Path

import pytest

from miniserve.config import ConfigError
from miniserve.llm import LLM
from miniserve.sampling_params import SamplingParams
from tests.model.test_layouts import fused, laid
from tests.model.test_quantized import dequantized
from tests.support import tiny
from tests.support.engines import prompts, small
from tests.support.native_kernels import op_by_op
from tests.support.packed import awq, fp8, gptq, write_packed
from tests.support.ranks import generate, greedy, several
from tests.support.whole import check_pool

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("compiled_kernels")]

TOKENS = 24
ITEMS = prompts(4, 60, seed=2)
AWQ, GPTQ = {"quant_method": "awq", "bits": 4}, {"quant_method": "gptq", "bits": 4}


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model of each architecture whose sizes 4 divides, some with as many numbers as the native kernels want."""
    root = tmp_path_factory.mktemp("wide")
    sizes = {"heads": 8, "hidden": 256, "kv_heads": 4, "wide": True, "seed": 11}
    return {arch: tiny.make_model(root / arch, arch, tie=arch in ("llama", "gemma3"), **sizes) for arch in tiny.KINDS}


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("arch", tiny.KINDS)
def test_text(wide, arch, ranks):
    with several(wide[arch], ranks, max_num_batched_tokens=48) as built:
        assert built[0].facts.kernels == "native"
        assert greedy(built[0].engine, ITEMS, TOKENS) == tiny.reference(wide[arch], ITEMS, TOKENS)


@pytest.mark.parametrize("arch", ["qwen2", "qwen3_next"])
def test_torch_kernels(wide, arch):
    with several(wide[arch], 2, cpu_kernels="torch", max_num_batched_tokens=48) as built:
        assert built[0].facts.kernels == "torch"
        assert greedy(built[0].engine, ITEMS, TOKENS) == tiny.reference(wide[arch], ITEMS, TOKENS)


@pytest.mark.parametrize("arch", ["llama", "gemma3"])
def test_op_by_op(wide, arch):
    with several(wide[arch], 2) as built:
        for one in built:
            one.runner.transformer = op_by_op(one.runner.transformer)
        assert greedy(built[0].engine, ITEMS, TOKENS) == tiny.reference(wide[arch], ITEMS, TOKENS)


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 2])
def test_fewer_heads_of_keys_than_ranks_and_an_odd_vocabulary(tmp_path, kv_heads, overlap):
    sizes = {"heads": 4, "hidden": 128, "kv_heads": kv_heads, "vocab": 323}
    folder = tiny.make_model(tmp_path / "m", "qwen3", head_dim=32, **sizes)
    with several(folder, 4, async_scheduling=overlap, prompt_lookup=not overlap) as built:
        assert greedy(built[0].engine, ITEMS, TOKENS) == tiny.reference(folder, ITEMS, TOKENS)


def test_penalties_with_an_odd_vocabulary(tmp_path):
    """The rows of logits are then shorter than what the ranks give for them."""
    folder = tiny.make_model(tmp_path / "m", "llama", vocab=323)
    params = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, repetition_penalty=1.4)
    texts = []
    for ranks in (1, 2):
        with several(folder, ranks) as built:
            outputs = generate(built[0].engine, ITEMS, params)
            texts.append([[token for output in each for token in output.tokens] for each in outputs])
    assert texts[0] == texts[1]
    assert texts[0] != tiny.reference(folder, ITEMS, TOKENS)


@pytest.mark.parametrize("arch", ["gemma3", "qwen3_moe"])
def test_bf16_text_is_the_same_in_any_batch(wide, arch):
    with several(wide[arch], 2, dtype="bfloat16") as built:
        if built[0].facts.kernels != "native":
            pytest.skip(built[0].facts.kernels)
        alone = [greedy(built[0].engine, [item], TOKENS)[0] for item in ITEMS]
    for chunk in (7, 512):
        with several(wide[arch], 2, dtype="bfloat16", max_num_batched_tokens=chunk) as built:
            assert greedy(built[0].engine, ITEMS, TOKENS) == alone


def test_biases(tmp_path):
    """Those of what is cut by columns are added once."""
    folder = tiny.make_model(tmp_path / "m", "llama", attention_bias=True, mlp_bias=True)
    with several(folder, 2) as built:
        assert greedy(built[0].engine, ITEMS, TOKENS) == tiny.reference(folder, ITEMS, TOKENS)


def test_experts_in_one_tensor(wide, tmp_path):
    folder = laid(wide["qwen3_5_moe"], tmp_path / "m", [fused])
    with several(folder, 2) as built:
        assert greedy(built[0].engine, ITEMS, TOKENS) == tiny.reference(wide["qwen3_5_moe"], ITEMS, TOKENS)


@pytest.mark.parametrize(("arch", "bits"), [("llama", 4), ("qwen3_next", 8)])
def test_quantized_when_loaded(wide, tmp_path, arch, bits):
    truth = tiny.reference(dequantized(wide[arch], tmp_path / "plain", bits), ITEMS, TOKENS)
    with several(wide[arch], 2, quantization=f"int{bits}") as built:
        assert greedy(built[0].engine, ITEMS, TOKENS) == truth


@pytest.mark.parametrize(("pack", "says"), [(awq, AWQ), (gptq, GPTQ), (fp8, {"quant_method": "fp8"})])
def test_quantized_files(wide, tmp_path, pack, says):
    folder = write_packed(wide["qwen2"], tmp_path / "packed", pack, says, tmp_path / "plain")
    with several(folder, 4) as built:
        assert greedy(built[0].engine, ITEMS, TOKENS) == tiny.reference(tmp_path / "plain", ITEMS, TOKENS)


def test_parts_of_groups_are_refused(tmp_path):
    folder = tiny.make_model(tmp_path / "m", "llama", hidden=64, heads=4, kv_heads=4)
    packed = write_packed(folder, tmp_path / "packed", gptq, GPTQ, tmp_path / "plain")
    says = r"o_proj.weight .* groups of 32, .* smaller --tensor-parallel-size"
    with pytest.raises(ConfigError, match=says), several(packed, 4):
        pass


def test_pages_leave_and_come_back(wide):
    """Swap space and snapshots of recurrent state: every rank copies its own."""
    folder = wide["qwen3_5"]
    items = prompts(12, 120, seed=5)
    texts = tiny.reference(folder, items, 8)
    again = [item + text + [7] for item, text in zip(items, texts, strict=True)]
    with several(folder, 2, kv_cache_memory=2**20, swap_space=2**23, max_model_len=256, max_num_seqs=4) as built:
        engine = built[0].engine
        assert greedy(engine, items, 8) == texts
        assert greedy(engine, again, 8) == tiny.reference(folder, again, 8)
        assert engine.host.offloaded > 0
        assert engine.host.restored > 0
        assert engine.snapshots.used > 0
        check_pool(engine.pool)


def test_scores_of_prompts(wide, monkeypatch):
    """Their logits are made in blocks on all ranks."""
    monkeypatch.setattr("miniserve.worker.runner.SCORED_LOGITS", 320 * 7)
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, prompt_logprobs=2, logprobs=2)
    alone = small(wide["qwen3"], dtype="float32").generate(ITEMS, params, progress=False)
    with several(wide["qwen3"], 2) as built:
        for item, one in zip(ITEMS, alone, strict=True):
            (outputs,) = generate(built[0].engine, [item], params)
            assert [token for output in outputs for token in output.tokens] == one.outputs[0].token_ids
            scored = outputs[0].prompt_logprobs or []
            assert [s.logprob for s in scored] == pytest.approx(
                [s.logprob for s in one.prompt_logprobs or []], abs=1e-4
            )


def test_random_weights_are_parts_of_the_same_model(wide):
    """What one rank would draw, two do together."""
    with several(wide["llama"], 2, load_format="dummy") as built:
        model = built[0].runner.transformer.config
        one = LLM(str(wide["llama"]), load_format="dummy", dtype="float32", kv_cache_memory=2**21)
        params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
        texts = [output.outputs[0].token_ids for output in one.generate(ITEMS, params, progress=False)]
        assert greedy(built[0].engine, ITEMS, 8) == texts
        assert model.heads == 4
        assert built[0].layout == built[1].layout != one._built.layout, "their pages are no good for each other"


def test_sizes_and_processes_that_cannot_be(wide, tiny_folder):
    with pytest.raises(ConfigError, match="Ranks are processes, which `miniserve serve` starts"):
        small(tiny_folder, tensor_parallel_size=2)
    says = r"--tensor-parallel-size 3 does not divide 8 heads.*: use 1, 2, 4, 8"
    with pytest.raises(ConfigError, match=says), several(wide["llama"], 3):
        pass
