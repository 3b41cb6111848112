#!/usr/bin/env python3
"""Speed of models with experts or a recurrent state, of which no weights are at hand: random ones of the same shapes.

  scripts/bench_layers.py qwen3.5-0.8b --folder DIR --rounds 3 --json FILE.json
  llama-bench -m DIR/qwen3.5-0.8b/model.bf16.gguf -t 2 -p 512 -n 32

Makes a Hugging Face folder and a GGUF with equal sizes, then lets miniserve's engine and transformers take turns in one
process: a prompt of 512 tokens, and 32 tokens behind it, one stream, bf16. `qwen3-30b-a3b-layer` is one layer of
Qwen3-30B-A3B with a small vocabulary.
"""

from __future__ import annotations

import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from miniserve.config import EngineConfig
from miniserve.sampling_params import SamplingParams
from miniserve.worker.build import build
from miniserve.worker.sequence import Sequence
from scripts.harness import flags, in_turns, write
from tests.support.tiny import write_tokenizer

PROMPT, OUTPUT = 512, 32
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3-30b-a3b-layer": (
        "Qwen3Moe",
        {
            "vocab_size": 2048,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "num_hidden_layers": 1,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
            "norm_topk_prob": True,
            "tie_word_embeddings": False,
        },
    ),
    "qwen3.5-0.8b": (
        "Qwen3_5",
        {
            "vocab_size": 248320,
            "hidden_size": 1024,
            "intermediate_size": 3584,
            "num_hidden_layers": 24,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "head_dim": 256,
            "linear_num_key_heads": 16,
            "linear_num_value_heads": 16,
            "tie_word_embeddings": True,
        },
    ),
}
KEYS = {
    "num_hidden_layers": "block_count",
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "vocab_size": "vocab_size",
    "num_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "moe_intermediate_size": "expert_feed_forward_length",
}
"""What GGUF calls the keys of config.json."""


def make(name: str, folder: Path) -> None:
    """Random weights in `folder`, as safetensors and as GGUF."""
    import transformers

    kind, sizes = MODELS[name]
    text = "Text" if kind == "Qwen3_5" else ""
    rope = {"rope_theta": 1e6, "rope_type": "default", **({"partial_rotary_factor": 0.25} if text else {})}
    config = getattr(transformers, f"{kind}{text}Config")(
        architectures=[f"{kind}ForCausalLM"], max_position_embeddings=4096, rope_parameters=rope, **sizes
    )
    torch.set_default_dtype(torch.bfloat16)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    torch.set_default_dtype(torch.float32)
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    write_tokenizer(folder, 320)
    _write_gguf(folder / "model.bf16.gguf", "qwen35" if text else "qwen3moe", sizes, model.state_dict())


def _write_gguf(path: Path, arch: str, sizes: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    import gguf

    writer = gguf.GGUFWriter(path, arch)
    for key, value in sizes.items():
        if key in KEYS:
            writer.add_uint32(f"{arch}.{KEYS[key]}", value)
    writer.add_uint32(f"{arch}.context_length", 4096)
    for key in ("key_length", "value_length"):
        writer.add_uint32(f"{arch}.attention.{key}", sizes["head_dim"])
    writer.add_float32(f"{arch}.attention.layer_norm_rms_epsilon", 1e-6)
    writer.add_float32(f"{arch}.rope.freq_base", 1e6)
    if arch == "qwen35":
        heads = sizes["linear_num_value_heads"]
        ssm = {"conv_kernel": 4, "state_size": 128, "group_count": sizes["linear_num_key_heads"]}
        for key, value in (ssm | {"time_step_rank": heads, "inner_size": heads * 128}).items():
            writer.add_uint32(f"{arch}.ssm.{key}", value)
        writer.add_uint32(f"{arch}.rope.dimension_count", 64)
        writer.add_array(f"{arch}.rope.dimension_sections", [11, 11, 10, 0])
    writer.add_string("tokenizer.ggml.model", "none")
    kind = gguf.GGMLQuantizationType
    names = gguf.get_tensor_name_map({v: k for k, v in gguf.MODEL_ARCH_NAMES.items()}[arch], sizes["num_hidden_layers"])
    for name, tensor in tensors.items():
        if "gate_up_proj" in name:
            gate, up = tensor.chunk(2, 1)
            parts = {name.replace("gate_up_proj", "gate_proj"): gate, name.replace("gate_up_proj", "up_proj"): up}
        else:
            parts = {name.replace("dt_bias", "dt_proj.bias"): tensor}
        for part, weight in parts.items():
            if part == "lm_head.weight" and sizes["tie_word_embeddings"]:
                continue
            plain = weight.squeeze().float().contiguous().numpy()
            ending = ".bias" if part.endswith(".bias") else "" if part.endswith("A_log") else ".weight"
            stored = f"{names.get_name(part.removesuffix('.weight').removesuffix('.bias'))}{ending}"
            if plain.ndim > 1 and "conv1d" not in part and "ffn_gate_inp" not in stored:
                writer.add_tensor(stored, gguf.quants.quantize(plain, kind.BF16), raw_dtype=kind.BF16)
            else:
                writer.add_tensor(stored, plain)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def miniserve_runs(folder: Path) -> Callable[[], dict[str, float]]:
    """A run of miniserve's engine, whose prefix cache is off."""
    config = EngineConfig(model=str(folder), enable_prefix_caching=False, max_num_seqs=2, max_model_len=1024)
    made = build(config)
    print(f"miniserve: {made.facts.kernels} kernels, {made.facts.dtype}, {made.facts.threads} threads", flush=True)
    params = SamplingParams(temperature=0, max_tokens=OUTPUT + 1, ignore_eos=True)

    def run() -> dict[str, float]:
        engine, times = made.engine, []
        engine.add(Sequence("t", random.choices(range(250), k=PROMPT), params, 0, b"root"))
        began = time.perf_counter()
        while engine.find("t"):
            engine.admit()
            engine.step()
            times.append(time.perf_counter())
        first = len(times) - OUTPUT - 1
        return _rates(times[first] - began, times[-1] - times[first])

    return run


def transformers_runs(folder: Path) -> Callable[[], dict[str, float]]:
    """A run of transformers' own model with its cache."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()

    @torch.inference_mode()
    def run() -> dict[str, float]:
        tokens, past = torch.tensor([random.choices(range(250), k=PROMPT)]), None
        times = [time.perf_counter()]
        for _ in range(OUTPUT + 1):
            out = model(tokens, past_key_values=past, use_cache=True, logits_to_keep=1)
            tokens, past = out.logits[:, -1:].argmax(-1), out.past_key_values
            times.append(time.perf_counter())
        return _rates(times[1] - times[0], times[-1] - times[1])

    return run


def _rates(prompt: float, output: float) -> dict[str, float]:
    return {"prefill, tok/s": PROMPT / prompt, "decode, tok/s": OUTPUT / output}


def main() -> int:
    parser = flags(__doc__)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    folder = args.folder / args.model
    if not (folder / "config.json").is_file():
        make(args.model, folder)
    runs = {"miniserve": miniserve_runs(folder), "transformers": transformers_runs(folder)}
    found = in_turns(runs, args.rounds, lambda name: runs[name](), warm_up=1)
    for name, rows in found.items():
        figures = {key: [round(row[key], 1) for row in rows] for key in rows[0]}
        print(name, {key: (statistics.median(values), values) for key, values in figures.items()})
    write(args.json, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
