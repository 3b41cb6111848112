"""GGUF files of tiny models, written by the gguf library, and plain models of the numbers that are in one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import torch
from safetensors.torch import load_file, save_file

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def write_gguf(
    folder: Path,
    file: Path,
    kinds: Callable[[str], str] = lambda name: "Q4_0",
    plain: Path | None = None,
    extra: dict[str, torch.Tensor] | None = None,
    **meta: Any,
) -> Path:
    """The model in `folder` as a GGUF, matrices in the kinds of tensors that their Hugging Face names get.

    Returns `file`. The same numbers in fp32 become a model in `plain`. `extra` tensors are added as they are; `meta`
    are further keys, `__` for a dot; None takes one out."""
    config = json.loads((folder / "config.json").read_text())
    arch = {"mistral": "llama"}.get(config["model_type"], config["model_type"])
    values: dict[str, Any] = {
        "general.architecture": arch,
        f"{arch}.block_count": config["num_hidden_layers"],
        f"{arch}.context_length": config["max_position_embeddings"],
        f"{arch}.embedding_length": config["hidden_size"],
        f"{arch}.feed_forward_length": config["intermediate_size"],
        f"{arch}.attention.head_count": config["num_attention_heads"],
        f"{arch}.attention.head_count_kv": config["num_key_value_heads"],
        f"{arch}.attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        f"{arch}.rope.freq_base": 10000.0,
        **tokenizer(folder),
    }
    if config.get("head_dim"):
        values[f"{arch}.attention.key_length"] = config["head_dim"]
    values |= {key.replace("__", "."): value for key, value in meta.items()}
    writer = gguf.GGUFWriter(file, values.pop("general.architecture"))
    for key, value in values.items():
        if value is not None:
            add(writer, key, value)
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    numbers = {}
    for name, tensor in tensors_of(folder).items():
        if name == "lm_head.weight" and config["tie_word_embeddings"]:
            continue
        stem, _, suffix = name.rpartition(".")
        part = stem.removeprefix("model.layers.").partition(".")[2] if "layers" in stem else stem
        own = f"blk.{stem.split('.')[2]}.{NAMES[part]}" if "layers" in stem else NAMES[part]
        kind = gguf.GGMLQuantizationType[kinds(name) if tensor.dim() > 1 else "F32"]
        rows, turn = tensor.float(), heads.get(part.rpartition(".")[2], 0) if arch == "llama" else 0
        if turn:  # the two halves of a head become pairs
            rows = torch.stack(rows.view(turn, 2, -1, *rows.shape[1:]).unbind(1), 2).reshape(rows.shape)
        data = gguf.quantize(rows.numpy(), kind)
        writer.add_tensor(f"{own}.{suffix}", data, raw_dtype=kind)
        back = torch.from_numpy(gguf.dequantize(data, kind)).view(rows.shape)
        if turn:  # pairs become the two halves of a head
            back = torch.stack(back.view(turn, -1, 2, *back.shape[1:]).unbind(2), 1).reshape(rows.shape)
        numbers[name] = back.contiguous()
    for name, tensor in (extra or {}).items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    if plain is not None:
        plain.mkdir()
        for path in folder.iterdir():
            if "safetensors" not in path.name:
                shutil.copy(path, plain)
        save_file(numbers, plain / "model.safetensors", metadata={"format": "pt"})
    return file


def add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    kinds.get(type(value), writer.add_array)(key, value)


def tokenizer(folder: Path) -> dict[str, Any]:
    """The metadata of a tiny model's byte-level tokenizer."""
    made = json.loads((folder / "tokenizer.json").read_text())
    special = {token["content"]: token["id"] for token in made["added_tokens"]}
    ids = made["model"]["vocab"] | special
    tokens = sorted(ids, key=ids.__getitem__)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in special else 1 for token in tokens],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in made["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": special[settings["bos_token"]],
        "tokenizer.ggml.eos_token_id": special[settings["eos_token"]],
        "tokenizer.ggml.padding_token_id": special[settings["pad_token"]],
        "tokenizer.chat_template": settings["chat_template"],
    }


def plain_copy(folder: Path, out: Path) -> Path:
    """What a folder with a Llama's `model.gguf` holds, as fp32 safetensors, for transformers; returns `out`."""
    shutil.copytree(folder, out, ignore=shutil.ignore_patterns("model.*"))
    config = json.loads((folder / "config.json").read_text())
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    back = {own: name for name, own in NAMES.items()}
    numbers = {}
    for tensor in gguf.GGUFReader(folder / "model.gguf").tensors:
        rows = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        parts = tensor.name.split(".")
        if turn := heads.get(parts[-2], 0):
            rows = torch.stack(rows.view(turn, -1, 2, rows.shape[1]).unbind(2), 1).reshape(rows.shape)
        start = f"model.layers.{parts[1]}." if parts[0] == "blk" else ""
        numbers[f"{start}{back[parts[-2]]}.{parts[-1]}"] = rows.contiguous()
    save_file(numbers, out / "model.safetensors", metadata={"format": "pt"})
    return out
