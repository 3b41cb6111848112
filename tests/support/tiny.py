"""Tiny random models on disk, and what transformers answers with them: the truth of all tests of greedy parity."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any

import torch

from miniserve.families import FAMILIES
from miniserve.text.tokenizer import byte_alphabet, byte_level_bpe

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
"""The last three ids of the vocabulary, in this order; the first and the last end a turn."""

CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

# Each is merged byte by byte from its left: words, whole characters, and pieces of characters as real vocabularies
# have them (the end of one and the beginning of the next, the first half of every emoji).
MERGED = (" the", "ing", " and", "hello", "er", " w", "é", "ß")
MERGED_BYTES = (b"\xf0\x9f", b"\xe2\x82", b"\xe4\xbd", b"\xa0\xe5")

LLAMA3: dict[str, Any] = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    # So short that low, middle and high frequencies of a small head all exist within a small context.
    "original_max_position_embeddings": 64,
}
LINEAR: dict[str, Any] = {"rope_type": "linear", "factor": 4.0}
ROPE: dict[str | None, dict[str, Any]] = {None: {"rope_type": "default"}, "llama3": LLAMA3, "linear": LINEAR}
DENSE = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "mistral": "Mistral"}
NEWER = {
    "mixtral": "Mixtral",
    "qwen3_moe": "Qwen3Moe",
    "qwen3_next": "Qwen3Next",
    "qwen3_5": "Qwen3_5",
    "qwen3_5_moe": "Qwen3_5Moe",
    "gemma3": "Gemma3",
}
KINDS = DENSE | NEWER
ARCHITECTURES = tuple(DENSE)
EXPERTS = {"num_experts_per_tok": 2, "norm_topk_prob": True, "moe_intermediate_size": 64, "num_experts": 4}
DELTA = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": None},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 40},
    "qwen3_moe": EXPERTS | {"norm_topk_prob": False, "mlp_only_layers": [0]},
    "qwen3_next": EXPERTS | DELTA | {"shared_expert_intermediate_size": 32},
    "qwen3_5": DELTA,
    "qwen3_5_moe": EXPERTS | DELTA | {"shared_expert_intermediate_size": 32},
    "gemma3": {
        "sliding_window": 24,
        "layer_types": ["sliding_attention", "full_attention"],
        "query_pre_attn_scalar": 24,
    },
}
"""What each architecture has beside what all have; windows are shorter than the tests' prompts."""
WIDE = {
    "moe_intermediate_size": 128,
    "shared_expert_intermediate_size": 128,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
}


def make_model(
    folder: Path,
    arch: str,
    *,
    tie: bool = False,
    rope_scaling: str | None = None,
    layers: int = 2,
    hidden: int = 128,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int | None = None,
    vocab: int = 320,
    max_len: int = 512,
    shards: int = 1,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    old_config_shape: bool = False,
    wide: bool = False,
    **more: Any,
) -> Path:
    """Write a random model of `arch` (of `KINDS`) with a byte-level tokenizer; returns `folder`.

    Weights are drawn wide enough that greedy text wanders, norms and biases too, so that leaving one out changes the
    text. `rope_scaling` is None, `llama3` or `linear`; `shards` is the least number of safetensors files.
    `old_config_shape` writes config.json as transformers 4 did (`rope_theta`, `rope_scaling`, `torch_dtype`). In a
    `wide` one experts and recurrent layers have sizes that can be divided by four. `more` stands in config.json.
    """
    import transformers

    kind, options = KINDS[arch], OPTIONS.get(arch, {}) | more
    if wide:
        options |= {key: value for key, value in WIDE.items() if key in options}
    layers = len(options.get("layer_types", range(layers)))
    if head_dim is not None:
        options["head_dim"] = head_dim
    elif arch in NEWER or arch == "qwen3":  # whose own default is larger
        options["head_dim"] = 64 if "linear_num_key_heads" in options else hidden // heads
    rope: dict[str, Any] = {"rope_theta": 10000.0, **ROPE[rope_scaling]}
    if arch == "gemma3":
        rope = {
            "full_attention": {"rope_theta": 1e6, "rope_type": "linear", "factor": 8.0},
            "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
        }
    text = "Text" if arch in ("qwen3_5", "qwen3_5_moe", "gemma3") else ""
    config = getattr(transformers, f"{kind}{text}Config")(
        architectures=[f"{kind}ForCausalLM"],
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=max_len,
        rope_parameters=rope,
        tie_word_embeddings=tie,
        bos_token_id=vocab - 3,
        eos_token_id=vocab - 1,
        pad_token_id=vocab - 3,
        **options,
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    _randomize(model, seed)
    model.to(dtype)
    folder.mkdir(parents=True, exist_ok=True)
    size = sum(parameter.nbytes for parameter in model.parameters())
    model.save_pretrained(folder, max_shard_size=size + 1 if shards == 1 else size // shards)
    if old_config_shape:
        _write_old_config(folder / "config.json")
    write_tokenizer(folder, vocab)
    eos = {"bos_token_id": vocab - 3, "eos_token_id": [vocab - 1, vocab - 3]}
    (folder / "generation_config.json").write_text(json.dumps(eos))
    return folder


def reference(folder: Path, prompts: Sequence[Sequence[int]], max_tokens: int) -> list[list[int]]:
    """The `max_tokens` tokens that transformers' own model puts after each of `prompts`: greedy, fp32, end-of-text
    tokens ignored, one prompt at a time.

    Raises ValueError where two tokens are so close that rounding decides: correct implementations may differ there, so
    the test needs other prompts or another seed.
    """
    return [list(_continued(folder, tuple(prompt), max_tokens)) for prompt in prompts]


@torch.no_grad()
def reference_logits(folder: Path, tokens: Sequence[int]) -> torch.Tensor:
    """transformers' own fp32 logits [len(tokens), vocab] of one sequence."""
    logits: torch.Tensor = _load(folder)(torch.tensor([list(tokens)])).logits
    return logits[0]


def prompts(count: int, *, seed: int = 0, shortest: int = 3, longest: int = 60, vocab: int = 320) -> list[list[int]]:
    """`count` prompts of mixed lengths of random tokens, none of them special; the same for the same `seed`."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, longest + 1, (count,), generator=generator)
    return [torch.randint(vocab - len(SPECIAL), (int(n),), generator=generator).tolist() for n in lengths]


# --- the tokenizer --------------------------------------------------------------------------------------------------


def write_tokenizer(folder: Path, vocab: int = 320) -> None:
    """Write tokenizer.json and tokenizer_config.json: bytes are their own ids, then merges, then `SPECIAL`."""
    alphabet = byte_alphabet()
    ids = {alphabet[byte]: byte for byte in range(256)}
    merges: list[tuple[str, str]] = []

    def merge(left: str, right: str) -> None:
        if left + right not in ids:
            ids[left + right] = len(ids)
            merges.append((left, right))

    for raw in (*(text.encode() for text in MERGED), *MERGED_BYTES):
        text = "".join(alphabet[byte] for byte in raw)
        for end in range(1, len(text)):
            merge(text[:end], text[end])
    letters = "etaoinshrdlucmfwypvbgkjqxz"
    pairs = ((a, b) for a in letters for b in letters)
    while len(ids) < vocab - len(SPECIAL):
        merge(*next(pairs))
    if len(ids) + len(SPECIAL) != vocab:
        raise ValueError(f"the tiny tokenizer needs at least {len(ids) + len(SPECIAL)} tokens, not {vocab}")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL[0],
        "eos_token": SPECIAL[2],
        "pad_token": SPECIAL[0],
        "clean_up_tokenization_spaces": False,
        "chat_template": CHATML,
    }
    byte_level_bpe(ids, merges, SPECIAL).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


# --- details --------------------------------------------------------------------------------------------------------


def edit_json(path: Path, **values: Any) -> None:
    """Set keys of a JSON file; None takes them out."""
    data = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({key: value for key, value in (data | values).items() if value is not None}))


@torch.no_grad()
def _randomize(model: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    zero_norms = FAMILIES[type(model).__name__].zero_norms
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.uniform_(0.5, 1.5, generator=generator)
            if zero_norms and "linear_attn" not in name:
                parameter -= 1
        elif name.endswith("A_log"):
            # So that much of a prompt is remembered.
            parameter.uniform_(-6, -1, generator=generator)
        elif name.endswith("bias"):
            parameter.normal_(0, 0.5, generator=generator)
        else:
            # Keeps the size of what goes through, and doubles it: attention then looks at something, not everything.
            parameter.normal_(0, 2 / math.sqrt(parameter.shape[-1]), generator=generator)


def _write_old_config(path: Path) -> None:
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    config["torch_dtype"] = config.pop("dtype")
    path.write_text(json.dumps(config))


@lru_cache(maxsize=4096)  # tests that differ in the topology or the policy only ask for the same texts
@torch.no_grad()
def _continued(folder: Path, prompt: tuple[int, ...], max_tokens: int) -> tuple[int, ...]:
    model = _load(folder)
    fresh, past = list(prompt), None
    answer: list[int] = []
    while len(answer) < max_tokens:
        out = model(torch.tensor([fresh]), past_key_values=past, use_cache=True)
        past = out.past_key_values
        best = out.logits[0, -1].topk(2)
        if best.values[0] - best.values[1] < 2e-5:
            raise ValueError(f"a tie after {len(prompt)} + {len(answer)} tokens: {best}")
        fresh = [int(best.indices[0])]
        answer += fresh
    return tuple(answer)


LOADING = Lock()
"""`from_pretrained` replaces methods of its classes while it runs. Two at once leave them replaced: models loaded later
have no tied weights, but what was in memory."""


def _load(folder: Path) -> Any:
    with LOADING:
        return _loaded(folder)


@lru_cache(maxsize=16)
def _loaded(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
