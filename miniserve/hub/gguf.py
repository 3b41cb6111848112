"""A GGUF file as a model's folder: `python -m miniserve.hub.gguf IN.gguf OUT_DIR` writes what is to lie beside it.

A vocabulary takes seconds to read from a GGUF, so this is done once, in a process of its own, whose memory goes away
with it. Workers read the tensors by `GGUF_INDEX`. Byte-level vocabularies become a tokenizer.json here, since some of
transformers' readers leave out how text is split first; sentencepiece ones become one by transformers.
"""

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from miniserve.cluster.launch import import_path
from miniserve.config import cache_dir, read_object
from miniserve.hub.check import GGUF, GGUF_INDEX, ModelError
from miniserve.text.tokenizer import byte_level_bpe

RECIPE = 1
"""Number of the way a GGUF is turned into a folder; one made by another recipe is made again."""
BESIDE = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
"""Files in a folder with one GGUF that count before what the GGUF says."""
CONTROL, USER_DEFINED = 3, 4
"""Types of tokens that stand for themselves in a text: special ones, and others."""
ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM"}
"""By GGUF's name; a Mistral is called llama."""
NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = LLAMA3.replace("{1,3}", "")
SPLITS = {
    "gpt-2": "",
    "smollm": "",
    "llama-bpe": LLAMA3,
    "llama3": LLAMA3,
    "llama-v3": LLAMA3,
    "smaug-bpe": LLAMA3,
    "tekken": TEKKEN,
    "qwen2": QWEN2,
    "deepseek-r1-qwen": QWEN2,
}
"""How text is split before it is merged, by the name in `tokenizer.ggml.pre`, as the models' own tokenizer.json has it;
"" as GPT-2 does."""


def gguf_folder(given: Path, progress: Callable[[str], None]) -> Path:
    """The folder in the cache for a GGUF file, or for a folder with one, made now if it is not there; it links to the
    file. Raises `ModelError`."""
    found = [given] if given.is_file() else sorted(given.glob("*.gguf"))
    if len(found) > 1:
        raise ModelError(f"{given} has several models ({', '.join(p.name for p in found[:3])}): give one of the files.")
    file = found[0].resolve()
    beside = [given / name for name in BESIDE if given.is_dir() and (given / name).is_file()]
    stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in (file, *beside)]
    root = cache_dir() / "gguf"
    # Named after what it is made of, so that it never changes under a process that reads it.
    folder = root / f"{file.stem}-{hashlib.sha256(repr((RECIPE, stats)).encode()).hexdigest()[:8]}"
    if folder.is_dir():
        return folder
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root, prefix=".making-") as work:
            out = Path(work) / "model"
            out.mkdir(0o755)
            for path in beside:
                shutil.copyfile(path, out / path.name)
            progress(f"Reading the vocabulary of {file.name} (once)")
            describe(file, out)
            (out / GGUF).symlink_to(file)
            with contextlib.suppress(OSError):  # another process was first
                os.replace(out, folder)
    except OSError as error:
        where = "set MINISERVE_CACHE to a folder that has room"
        raise ModelError(f"{file.name} needs a few MB in {root}: {error.strerror or error}; {where}.") from error
    return folder


def describe(file: Path, out: Path) -> None:
    """Write what is in `file` into the folder `out`, in another process; files that are there already count first.
    Raises `ModelError`."""
    with file.open("rb") as start:
        if start.read(4) != b"GGUF":
            raise ModelError(f"{file} is no GGUF file: download it again (of a clone, with `git lfs pull`).")
    command = [sys.executable, "-m", "miniserve.hub.gguf", str(file), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | import_path())
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise ModelError(f"{file} cannot be served: {reason.removeprefix('ValueError: ').rstrip('.')}.")


# --- in a process of its own ----------------------------------------------------------------------------------------


def _describe(file: Path, out: Path) -> None:
    """Write config.json, the tokenizer's files and `GGUF_INDEX`. Raises ValueError."""
    import gguf

    if file.stat().st_size == 0:
        raise ValueError("it is empty")
    try:
        reader = gguf.GGUFReader(file)
        meta = {name: field.contents() for name, field in reader.fields.items()}
    except Exception as error:  # the library raises nothing more precise for a file that was cut short
        raise ValueError(f"it is damaged or cut short, download it again ({' '.join(str(error).split())})") from error
    arch = meta.get("general.architecture")
    if arch not in ARCHITECTURES:
        raise ValueError(f"it is a {arch}; miniserve serves {', '.join(ARCHITECTURES)}")
    if meta.get("split.count", 0) > 1:
        raise ValueError("it is one of several pieces: join them with `llama-gguf-split --merge`")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    frequencies = tensors.pop("rope_freqs.weight", None)
    made = _config(arch, meta, {name: [*map(int, reversed(tensor.shape))] for name, tensor in tensors.items()})
    # What lies there may be a stub; what the tensors are, the GGUF knows.
    config = made | read_object(out / "config.json") | {"tie_word_embeddings": made["tie_word_embeddings"]}
    config.pop("quantization_config", None)
    if frequencies is not None and not config["rope_scaling"] and "rope_parameters" not in config:
        config["rope_scaling"] = _llama3_scaling(config, frequencies.data.tolist())
    heads = (
        {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]} if arch == "llama" else {}
    )
    index = {}
    for name, tensor in tensors.items():
        part, suffix = name.removeprefix("blk.").rsplit(".", 1)
        layer, _, inner = part.partition(".")
        known = f"model.layers.{layer}.{LAYER_NAMES.get(inner)}" if inner in LAYER_NAMES else NAMES.get(part)
        if known is None:
            raise ValueError(f"it has the tensor {name}, which no {arch} of miniserve has")
        shape = [*map(int, reversed(tensor.shape))]
        where = int(tensor.data_offset), int(tensor.n_bytes), tensor.tensor_type.name
        index[f"{known}.{suffix}"] = [*where, shape, heads.get(inner, 0)]
    if "torch_dtype" not in config:
        (kind, *others) = sorted({kind for _, _, kind, shape, _ in index.values() if len(shape) > 1})
        plain = {"F16": "float16", "F32": "float32"} if not others else {}
        config.setdefault("dtype", plain.get(kind, "bfloat16"))
    (out / "config.json").write_text(json.dumps(config), "utf-8")
    (out / GGUF_INDEX).write_text(json.dumps(index), "utf-8")
    if not (out / "tokenizer.json").exists():
        (out / "tokenizer.json").write_text(_tokenizer(file, meta), "utf-8")
    if not (out / "tokenizer_config.json").exists():
        (out / "tokenizer_config.json").write_text(json.dumps(_special(meta)), "utf-8")
    if "tokenizer.chat_template" in meta and not (out / "chat_template.jinja").exists():
        (out / "chat_template.jinja").write_text(meta["tokenizer.chat_template"], "utf-8")
    for key in meta:
        if key.startswith("tokenizer.chat_template."):
            (out / "additional_chat_templates").mkdir(exist_ok=True)
            (out / "additional_chat_templates" / f"{Path(key).suffix[1:]}.jinja").write_text(meta[key], "utf-8")


def _config(arch: str, meta: dict[str, Any], shapes: dict[str, list[int]]) -> dict[str, Any]:
    """config.json as Hugging Face has it."""

    def get(key: str, *default: Any) -> Any:
        if f"{arch}.{key}" not in meta and not default:
            raise ValueError(f"it has no {arch}.{key}")
        return meta.get(f"{arch}.{key}", *default)

    heads, hidden = get("attention.head_count"), get("embedding_length")
    head_dim = get("attention.key_length", hidden // heads)
    if get("rope.dimension_count", head_dim) != head_dim:
        raise ValueError(f"it rotates {get('rope.dimension_count')} of {head_dim} numbers of a head; miniserve all")
    scaling = get("rope.scaling.type", "none")
    ends = [meta[key] for key in ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id") if key in meta]
    return {
        "architectures": [ARCHITECTURES[arch]],
        "model_type": arch,
        "vocab_size": shapes["token_embd.weight"][0],
        "hidden_size": hidden,
        "intermediate_size": get("feed_forward_length"),
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "rms_norm_eps": get("attention.layer_norm_rms_epsilon"),
        "max_position_embeddings": get("context_length"),
        "rope_theta": get("rope.freq_base", 10000.0),
        "rope_scaling": None
        if scaling == "none"
        else {"rope_type": scaling, "factor": get("rope.scaling.factor", 1.0)},
        "tie_word_embeddings": "output.weight" not in shapes,
        "attention_bias": "blk.0.attn_q.bias" in shapes,
        "mlp_bias": "blk.0.ffn_gate.bias" in shapes,
        "bos_token_id": meta.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": sorted(set(ends)),
    }


def _llama3_scaling(config: dict[str, Any], factors: list[float]) -> dict[str, Any]:
    """Of Llama 3.1 and later, whose GGUF has what each frequency is divided by."""
    import numpy as np

    factor, low, high, original = max(factors), 1.0, 4.0, 8192
    frequencies = config["rope_theta"] ** -(np.arange(0, config["head_dim"], 2) / config["head_dim"])
    blend = np.clip((original * frequencies / (2 * np.pi) - low) / (high - low), 0, 1)
    if not np.allclose(1 / ((1 - blend) / factor + blend), factors, rtol=1e-4):
        raise ValueError("it has rope_freqs.weight other than Llama 3's: give its folder, with the model's config.json")
    bounds = {"low_freq_factor": low, "high_freq_factor": high, "original_max_position_embeddings": original}
    return {"rope_type": "llama3", "factor": factor, **bounds}


def _special(meta: dict[str, Any]) -> dict[str, Any]:
    """tokenizer_config.json: the special tokens by what they are for."""
    tokens = meta["tokenizer.ggml.tokens"]
    keys = {"bos": "bos", "eos": "eos", "eot": "eot", "unk": "unknown", "pad": "padding"}
    ids = {name: meta.get(f"tokenizer.ggml.{key}_token_id") for name, key in keys.items()}
    texts = {f"{name}_token": tokens[i] for name, i in ids.items() if i is not None and i < len(tokens)}
    return {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **texts}


def _tokenizer(file: Path, meta: dict[str, Any]) -> str:
    """The text of tokenizer.json."""
    kind, tokens = meta["tokenizer.ggml.model"], meta["tokenizer.ggml.tokens"]
    if kind == "llama":
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).backend_tokenizer.to_str()
    pre = meta.get("tokenizer.ggml.pre", "")
    if kind != "gpt2" or pre not in SPLITS:
        raise ValueError(
            f"its tokenizer is {kind!r} {pre!r}, which miniserve does not know: put it into a folder with the model's "
            "tokenizer.json, and give that folder"
        )
    types = meta["tokenizer.ggml.token_type"]
    before: list[dict[str, Any]] = [{"type": "Digits", "individual_digits": True}] if pre == "smollm" else []
    if split := SPLITS[pre]:
        before = [{"type": "Split", "pattern": {"Regex": split}, "behavior": "Isolated", "invert": False}]
    made = byte_level_bpe(
        {token: i for i, token in enumerate(tokens)},
        [merge.split(" ") for merge in meta["tokenizer.ggml.merges"]],
        {i: token for i, token in enumerate(tokens) if types[i] in (CONTROL, USER_DEFINED)},
        use_regex=not split,
        before=before,
    )
    for added in made["added_tokens"]:
        added["special"] = types[added["id"]] == CONTROL
    if split == QWEN2:
        made["normalizer"] = {"type": "NFC"}
    whole = split in (LLAMA3, TEKKEN)
    made["model"]["ignore_merges"] = whole  # a word that is a token is that token
    bos = meta.get("tokenizer.ggml.bos_token_id")
    if bos is not None and meta.get("tokenizer.ggml.add_bos_token", whole):
        first = {"SpecialToken": {"id": tokens[bos], "type_id": 0}}
        made["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [first, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [first, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {tokens[bos]: {"id": tokens[bos], "ids": [bos], "tokens": [tokens[bos]]}},
        }
    return json.dumps(made, ensure_ascii=False)


if __name__ == "__main__":
    try:
        _describe(Path(sys.argv[1]), Path(sys.argv[2]))
    except ValueError as error:
        sys.exit(str(error))
