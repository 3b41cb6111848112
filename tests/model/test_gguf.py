"""GGUF files served as they are: the same numbers as the gguf library reads, the same text as transformers makes of
them."""

from __future__ import annotations

import json
import logging
from collections import Counter
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from miniserve.config import ConfigError
from miniserve.hub.check import check_folder
from miniserve.hub.resolve import resolve
from miniserve.model.checkpoints import GgufTensors
from miniserve.model.config import ModelConfig
from miniserve.model.rope import RopeConfig, angles
from miniserve.ops.quantized import Quantized, dense
from miniserve.text.tokenizer import Tokenizer
from tests.support import tiny
from tests.support.engines import KERNELS, greedy, small
from tests.support.gguf_files import write_gguf

KINDS = ["Q4_0", "Q4_1", "Q8_0", "F32", "F16", "BF16", "Q5_0", "Q6_K"]


@given(st.integers(0, 1000), st.sampled_from(KINDS), st.sampled_from([0, 1, 2]), st.integers(1, 3))
def test_tensors_have_the_numbers_that_the_library_reads(
    tmp_path_factory: pytest.TempPathFactory, seed: int, kind: str, heads: int, groups: int
) -> None:
    rows, width = 8, (256 if kind == "Q6_K" else 32) * groups
    numbers = np.random.default_rng(seed).normal(size=(rows, width)).astype(np.float32)
    known = gguf.GGMLQuantizationType[kind]
    if kind == "Q6_K":  # which the library only reads: any bits, with scales that are small numbers
        block = np.random.default_rng(seed).integers(0, 256, (rows, 210 * groups), dtype=np.uint8)
        block.reshape(rows, groups, 210)[..., 209] &= 0x3F
        data = block
    else:
        data = gguf.quantize(numbers, known)
    folder = tmp_path_factory.mktemp("gguf")
    raw = data.tobytes()
    (folder / "model.gguf").write_bytes(bytes(64) + raw)
    (folder / "model.json").write_text(json.dumps({"a": [64, len(raw), kind, [rows, width], heads]}))
    widened = Counter[str]()
    weight = GgufTensors(folder / "model.gguf", widened).read("a", (rows, width))
    want = torch.from_numpy(gguf.dequantize(data, known)).view(rows, width)
    if heads:
        want = torch.cat([head[i::2] for head in want.chunk(heads) for i in (0, 1)])
    torch.testing.assert_close(dense(weight, torch.float32).float(), want, rtol=0, atol=0)
    if isinstance(weight, Quantized):
        assert kind in ("Q4_0", "Q4_1", "Q8_0")
        assert weight.nbytes == len(raw)
        assert all(p is None or p.is_contiguous() for p in (weight.codes, weight.scales, weight.minimums))
    assert widened == ({kind: 1} if kind in ("Q5_0", "Q6_K") else {})


MIXED = {"v_proj": "Q8_0", "q_proj": "Q4_1", "o_proj": "Q4_1", "gate": "Q4_1", "lm_head": "Q8_0", "embed": "Q8_0"}
"""As files have them: parts of one matrix differ."""


@pytest.mark.parametrize(
    ("arch", "kind"),
    [("llama", kind) for kind in ("Q4_0", "Q4_1", "Q8_0", "F16", "Q5_0")]
    + [(arch, "mixed") for arch in ("llama", "qwen2", "qwen3", "mistral")],
)
def test_greedy_text_is_that_of_the_dequantized_weights(
    tiny_models: dict[str, Path], tmp_path: Path, arch: str, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    def kinds(name: str) -> str:
        return next((own for part, own in MIXED.items() if part in name), "Q4_0") if kind == "mixed" else kind

    file = write_gguf(tiny_models[arch], tmp_path / "m.gguf", kinds, tmp_path / "plain")
    prompts = tiny.prompts(3)
    truth = tiny.reference(tmp_path / "plain", prompts, 24)
    for kernels in KERNELS:
        assert greedy(small(file, dtype="float32", cpu_kernels=kernels), prompts, 24) == truth
    said = [record.getMessage() for record in caplog.records if "are served as float32" in record.getMessage()]
    assert len(said) == len(KERNELS) * (kind in ("Q5_0", "mixed")), said


def test_the_folder_is_made_once_and_again_when_the_file_changes(tiny_folder: Path, tmp_path: Path) -> None:
    file = write_gguf(tiny_folder, tmp_path / "m.gguf")
    lines: list[str] = []
    found = resolve(str(file), progress=lines.append)
    assert resolve(str(file), progress=lines.append).folder == found.folder
    assert lines == ["Reading the vocabulary of m.gguf (once)"]
    assert found.source == f"{file}, 4-bit (Q4_0)"
    write_gguf(tiny_folder, file, lambda name: "Q8_0")
    assert resolve(str(file)).folder != found.folder
    assert resolve(str(file)).source.endswith("8-bit (Q8_0)")
    # Larger or smaller: a worker that starts once more must not read it by the index of the old one.
    for content in (file.read_bytes(), b"GGUF"):
        file.write_bytes(content)
        with pytest.raises(ConfigError, match="start the server again"):
            check_folder(found.folder, dummy=False)


def test_what_lies_beside_the_file_counts_first(tiny_folder: Path, tmp_path: Path) -> None:
    write_gguf(tiny_folder, tmp_path / "m.gguf", tokenizer__ggml__pre="of another model")
    (tmp_path / "tokenizer.json").write_bytes((tiny_folder / "tokenizer.json").read_bytes())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "max_position_embeddings": 99}))
    found = resolve(str(tmp_path))
    assert found.config["max_position_embeddings"] == 99
    assert found.config["hidden_size"] == 128
    assert Tokenizer.load(found.folder).encode("hello") == Tokenizer.load(tiny_folder).encode("hello")


def test_tokenizer_template_and_ends_come_from_the_file(tiny_folder: Path, tmp_path: Path) -> None:
    folder = resolve(str(write_gguf(tiny_folder, tmp_path / "m.gguf"))).folder
    ours, theirs = Tokenizer.load(folder), Tokenizer.load(tiny_folder)
    said = [{"role": "user", "content": "hello, the wéird 123 ß😀"}]
    assert ours.chat(said) == theirs.chat(said)
    assert ours.eos_token_ids == {319}
    assert ours.special_ids == theirs.special_ids


def test_llama_3_scaling_is_told_by_its_factors(tiny_folder: Path, tmp_path: Path) -> None:
    said = dict(tiny.LLAMA3, original_max_position_embeddings=8192)
    model = replace(
        ModelConfig.from_hf(json.loads((tiny_folder / "config.json").read_text())), ropes=(RopeConfig(1e4),)
    )
    scaled = RopeConfig(1e4, "llama3", 8.0, 1.0, 4.0, 8192)
    factors = angles(model.ropes[0], 32, 2)[1] / angles(scaled, 32, 2)[1]
    file = write_gguf(tiny_folder, tmp_path / "m.gguf", extra={"rope_freqs.weight": factors})
    assert resolve(str(file)).config["rope_scaling"] == said
    write_gguf(tiny_folder, file, extra={"rope_freqs.weight": factors + torch.arange(16)})
    with pytest.raises(ConfigError, match=r"rope_freqs.weight other than Llama 3's"):
        resolve(str(file))
    write_gguf(tiny_folder, file, extra={"blk.0.ffn_gate_inp.weight": factors})
    with pytest.raises(ConfigError, match=r"has the tensor blk.0.ffn_gate_inp.weight, which no llama"):
        resolve(str(file))


@pytest.mark.parametrize(
    ("meta", "says"),
    [
        ({"general__architecture": "gemma3"}, "is a gemma3; miniserve serves llama"),
        ({"split__count": 3}, "llama-gguf-split --merge"),
        ({"tokenizer__ggml__pre": "new-bpe"}, "'gpt2' 'new-bpe', which miniserve does not know: .*tokenizer.json"),
        ({"llama__embedding_length": None}, "has no llama.embedding_length"),
        ({"llama__rope__dimension_count": 8}, "rotates 8 of 32"),
        ({"tokenizer__ggml__merges": None}, "has no 'tokenizer.ggml.merges'"),
    ],
)
def test_another_model_is_refused(tiny_folder: Path, tmp_path: Path, meta: dict[str, object], says: str) -> None:
    file = write_gguf(tiny_folder, tmp_path / "m.gguf", **meta)
    with pytest.raises(ConfigError, match=says) as refused:
        resolve(str(file))
    assert "\n" not in str(refused.value)


def test_a_damaged_file_is_refused(tiny_folder: Path, tmp_path: Path) -> None:
    file = write_gguf(tiny_folder, tmp_path / "m.gguf")
    whole = file.read_bytes()
    for size in (0, 3, 30, 5000, len(whole) - 1000):
        file.write_bytes(whole[:size])
        with pytest.raises(ConfigError, match=r"download it again") as refused:
            resolve(str(file))
        assert "\n" not in str(refused.value)
    (tmp_path / "n.gguf").touch()
    with pytest.raises(ConfigError, match=r"several models \(m.gguf, n.gguf\): give one"):
        resolve(str(tmp_path))


@pytest.mark.parametrize("scale", [np.nan, np.inf])
def test_scales_that_are_no_numbers_are_refused(tiny_folder: Path, tmp_path: Path, scale: float) -> None:
    file = write_gguf(tiny_folder, tmp_path / "m.gguf")
    content = bytearray(file.read_bytes())
    tensor = next(t for t in gguf.GGUFReader(file).tensors if t.name == "blk.0.attn_q.weight")
    content[tensor.data_offset : tensor.data_offset + 2] = np.float16(scale).tobytes()
    file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"scales of model.layers.0.self_attn.q_proj.weight .* not finite"):
        small(file)


def test_the_default_model_is_its_4_bits(
    smollm2_folder: Path, smollm2_plain: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Q4_1 in the layers, and a tied matrix of 8 bits that is the head as it is and the embedding dequantized."""
    assert check_folder(smollm2_folder, dummy=False).format == "4-bit (Q4_1)"
    prompts = [Tokenizer.load(smollm2_folder).encode("The history of bread begins")]
    with caplog.at_level(logging.WARNING, "miniserve"):
        llm = small(smollm2_folder, dtype="float32", cpu_kernels=KERNELS[-1], kv_cache_memory=2**26, max_model_len=256)
    assert greedy(llm, prompts, 16) == tiny.reference(smollm2_plain, prompts, 16)
    rows = 49152 * 576
    head, layers = rows * 8.5 / 8, 30 * (4 * 576 * 576 * 2 // 3 + 3 * 576 * 1536) * 5 / 8
    assert llm._built.facts.weights_bytes == pytest.approx(rows * 4 + head + layers, rel=0.01)
    assert not [record for record in caplog.records if record.name.startswith("miniserve")]


def test_a_sentencepiece_vocabulary_becomes_a_tokenizer(tiny_folder: Path, tmp_path: Path) -> None:
    """Its merges follow from the scores; what has no token is spelled in bytes."""
    words = ["\u2581", "t", "h", "e", "\u2581t", "he", "\u2581the", "l", "o", "ll", "hell", "hello", "\u2581hello"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    tokens += [f"[PAD{i}]" for i in range(len(tokens), 320)]
    meta = {
        "tokenizer__ggml__model": "llama",
        "tokenizer__ggml__pre": "default",
        "tokenizer__ggml__tokens": tokens,
        "tokenizer__ggml__scores": [0.0] * 259
        + [-float(len(words) - i) for i in range(len(words))]
        + [-1e4] * (61 - len(words)),
        "tokenizer__ggml__token_type": [2, 3, 3] + [6] * 256 + [1] * 61,
        "tokenizer__ggml__merges": None,
        "tokenizer__ggml__bos_token_id": 1,
        "tokenizer__ggml__eos_token_id": 2,
        "tokenizer__ggml__unknown_token_id": 0,
        "tokenizer__ggml__padding_token_id": None,
        "tokenizer__ggml__add_bos_token": True,
    }
    found = Tokenizer.load(resolve(str(write_gguf(tiny_folder, tmp_path / "m.gguf", **meta))).folder)
    ids = found.encode("hello the 1", add_special_tokens=False)
    assert [found.backend.id_to_token(token) for token in ids] == ["\u2581hello", "\u2581the", "\u2581", "<0x31>"]
    assert found.decode(ids) == "hello the 1"
    assert found.encode("hello")[0] == 1
    assert found.eos_token_ids == {2}
    assert found.encode("</s>", add_special_tokens=False) == [2]
