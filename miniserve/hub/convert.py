"""Weights and tokenizer of the default model from its pinned GGUF: `python -m miniserve.hub.convert IN.gguf OUT_DIR`.

Run as a process of its own by `miniserve.hub.fetch`, so that the memory it takes goes away with it. It reads GGUF's
metadata for a byte-level BPE Llama and is no general converter: the other files stand in the model's preset.
transformers can do this too, but only with accelerate installed, in three times the time, and with a tokenizer that
needs mending. Bump `fetch.RECIPE` when what it makes changes.
"""

import json
import sys
from pathlib import Path
from typing import Any

from miniserve.text.tokenizer import byte_level_bpe

CONTROL = 3
"""GGUF's token type of special tokens."""

LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
NAMES = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm.weight"}


def convert(gguf_file: Path, out: Path) -> None:
    """Write bf16 safetensors, tokenizer and chat template of `gguf_file` into the existing folder `out`. There is no
    `output.weight`: embeddings are tied.

    Raises ValueError where the file is not the kind of model this is made for.
    """
    import gguf
    import torch
    from safetensors.torch import save_file

    reader = gguf.GGUFReader(gguf_file)
    meta = {name: field.contents() for name, field in reader.fields.items()}
    if (kind := (meta["general.architecture"], meta["tokenizer.ggml.model"])) != ("llama", "gpt2"):
        raise ValueError(f"{gguf_file.name} is {kind}; only a Llama with a byte-level BPE tokenizer is converted here")
    heads = {"attn_q": meta["llama.attention.head_count"], "attn_k": meta["llama.attention.head_count_kv"]}
    weights = {}
    for tensor in reader.tensors:
        weight = torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type)).to(torch.bfloat16)
        if (name := NAMES.get(tensor.name)) is None:
            _, layer, part, suffix = tensor.name.split(".")
            name = f"model.layers.{layer}.{LAYER_NAMES[part]}.{suffix}"
            if part in heads:
                # llama.cpp keeps the two numbers that rope turns together side by side, Hugging Face half a head apart.
                weight = weight.view(heads[part], -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
        weights[name] = weight.contiguous()
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    (out / "tokenizer.json").write_text(json.dumps(tokenizer(meta), ensure_ascii=False), "utf-8")
    (out / "chat_template.jinja").write_text(meta["tokenizer.chat_template"], "utf-8")


def tokenizer(meta: dict[str, Any]) -> dict[str, Any]:
    """The tokenizer.json: byte-level BPE that splits numbers into single digits first, as SmolLM2 was trained."""
    tokens, types = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.token_type"]
    return byte_level_bpe(
        {token: i for i, token in enumerate(tokens)},
        [merge.split(" ") for merge in meta["tokenizer.ggml.merges"]],
        {i: token for i, token in enumerate(tokens) if types[i] == CONTROL},
        before=[{"type": "Digits", "individual_digits": True}],
    )


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
