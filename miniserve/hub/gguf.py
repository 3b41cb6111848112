"""A GGUF file as a model's folder: `python -m miniserve.hub.gguf IN.gguf OUT_DIR` writes what is to lie beside it.

A vocabulary takes seconds to read from a GGUF, so this is done once, in a process of its own, whose memory goes away
with it. Workers read the tensors by `GGUF_INDEX`. Byte-level vocabularies become a tokenizer.json here, since some of
transformers' readers leave out how text is split first; sentencepiece ones become one by transformers.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, normalizers
from tokenizers.pre_tokenizers import Digits, Split
from tokenizers.processors import TemplateProcessing

from miniserve.cluster.launch import import_path
from miniserve.config import ConfigError, cache_dir, make_once, problem, read_object, tables
from miniserve.hub.check import GGUF, GGUF_INDEX, GGUF_SEEN
from miniserve.text.tokenizer import byte_level_bpe

RECIPE = 2
"""Number of the way a GGUF is turned into a folder; one made by another recipe is made again."""
BESIDE = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
"""Files in a folder with one GGUF that count before what the GGUF says."""
CONTROL, USER_DEFINED = 3, 4
"""Types of tokens that stand for themselves in a text: special ones, and others."""
TABLES = tables("hub/gguf.toml")


def gguf_folder(given: Path, progress: Callable[[str], None]) -> Path:
    """The folder in the cache for a GGUF file, or a folder with one, made if it is not there. Raises `ConfigError`."""
    found = [given] if given.is_file() else sorted(given.glob("*.gguf"))
    if len(found) > 1:
        raise ConfigError(problem("hub.several", given=given, names=", ".join(path.name for path in found[:3])))
    file = found[0].resolve()
    beside = [given / name for name in BESIDE if given.is_dir() and (given / name).is_file()]
    stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in (file, *beside)]
    root = cache_dir() / "gguf"
    # Named after what it is made of, so that it never changes under a process that reads it.
    folder = root / f"{file.stem}-{hashlib.sha256(repr((RECIPE, stats)).encode()).hexdigest()[:8]}"

    def make(out: Path) -> None:
        out.mkdir()
        for path in beside:
            shutil.copyfile(path, out / path.name)
        progress(f"Reading the vocabulary of {file.name} (once)")
        describe(file, out)
        (out / GGUF).symlink_to(file)
        (out / GGUF_SEEN).write_text(json.dumps({"size": stats[0][1], "time": stats[0][2]}), "utf-8")

    try:
        return make_once(folder, make)
    except OSError as error:
        raise ConfigError(problem("hub.few_mb", name=file.name, root=root, why=error.strerror or error)) from error


def describe(file: Path, out: Path) -> None:
    """Write what is in `file` into `out`, in another process; files there already count first. Raises `ConfigError`."""
    with file.open("rb") as start:
        if start.read(4) != b"GGUF":
            raise ConfigError(f"{file} is no GGUF file: download it again (of a clone, with `git lfs pull`).")
    command = [sys.executable, "-m", "miniserve.hub.gguf", str(file), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | import_path())
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise ConfigError(f"{file} cannot be served: {reason.replace('KeyError:', 'it has no').rstrip('.')}.")


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
    arch, known = meta.get("general.architecture", ""), TABLES["architectures"]
    if arch not in known:
        raise ValueError(f"it is a {arch}; miniserve serves {', '.join(known)}")
    if meta.get("split.count", 0) > 1:
        raise ValueError("it is one of several pieces: join them with `llama-gguf-split --merge`")
    shapes = {tensor.name: [*map(int, reversed(tensor.shape))] for tensor in reader.tensors}
    made = _config(arch, meta, shapes)
    # What lies there may be a stub; what the tensors are, the GGUF knows.
    config = made | read_object(out / "config.json") | {"tie_word_embeddings": made["tie_word_embeddings"]}
    config.pop("quantization_config", None)
    # llama.cpp turns other pairs of a Llama's numbers with rope than Hugging Face does.
    heads = {"attn_q": made["num_attention_heads"], "attn_k": made["num_key_value_heads"]} if arch == "llama" else {}
    index: dict[str, list[Any]] = {}
    for tensor in reader.tensors:
        *block, part, suffix = tensor.name.split(".")  # blk, its number
        ours = TABLES["tensors"][block[0] if block else "model"].get(part)
        if tensor.name == "rope_freqs.weight":
            if not config["rope_scaling"] and "rope_parameters" not in config:
                config["rope_scaling"] = _llama3_scaling(made, tensor.data.tolist())
        elif ours is None:
            raise ValueError(f"it has the tensor {tensor.name}, which no {arch} of miniserve has")
        else:
            name = f"model.layers.{block[1]}.{ours}.{suffix}" if block else f"{ours}.{suffix}"
            where = int(tensor.data_offset), int(tensor.n_bytes), tensor.tensor_type.name
            index[name] = [*where, shapes[tensor.name], heads.get(part, 0) if block else 0]
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

    made = {name: get(key) for name, key in TABLES["config"].items()}
    head_dim = get("attention.key_length", made["hidden_size"] // made["num_attention_heads"])
    if get("rope.dimension_count", head_dim) != head_dim:
        raise ValueError(f"it rotates {get('rope.dimension_count')} of {head_dim} numbers of a head; miniserve all")
    scaling, factor = get("rope.scaling.type", "none"), get("rope.scaling.factor", 1.0)
    ends = [meta[key] for key in ("tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id") if key in meta]
    return made | {
        "architectures": [TABLES["architectures"][arch]],
        "model_type": arch,
        "vocab_size": shapes["token_embd.weight"][0],
        "num_key_value_heads": get("attention.head_count_kv", made["num_attention_heads"]),
        "head_dim": head_dim,
        "rope_theta": get("rope.freq_base", 10000.0),
        "rope_scaling": None if scaling == "none" else {"rope_type": scaling, "factor": factor},
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
    ids = {name: meta.get(f"tokenizer.ggml.{key}", len(tokens)) for name, key in TABLES["special"].items()}
    texts = {name: tokens[i] for name, i in ids.items() if i < len(tokens)}
    return {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **texts}


def _tokenizer(file: Path, meta: dict[str, Any]) -> str:
    """The text of tokenizer.json."""
    kind, tokens = meta["tokenizer.ggml.model"], meta["tokenizer.ggml.tokens"]
    if kind == "llama":
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).backend_tokenizer.to_str()
    pre = meta.get("tokenizer.ggml.pre", "")
    split = next((split for split in TABLES["splits"] if pre in split["names"]), None)
    if kind != "gpt2" or split is None:
        raise ValueError(problem("hub.tokenizer", kind=kind, pre=pre))
    types, regex, whole = meta["tokenizer.ggml.token_type"], split["regex"], split.get("whole", False)
    digits: list[Any] = [Digits(individual_digits=True)] if "digits" in split else []
    before = [Split(Regex(regex), "isolated")] if regex else digits
    merges = (tuple(merge.split(" ")) for merge in meta["tokenizer.ggml.merges"])
    special = (token for token, type in zip(tokens, types, strict=True) if type == CONTROL)
    made = byte_level_bpe(
        {token: i for i, token in enumerate(tokens)}, merges, special, use_regex=not regex, before=before
    )
    others = (token for token, type in zip(tokens, types, strict=True) if type == USER_DEFINED)
    made.add_tokens([AddedToken(token, normalized=False) for token in others])
    made.model.ignore_merges = whole
    if "normalizer" in split:
        made.normalizer = getattr(normalizers, split["normalizer"])()
    bos = meta.get("tokenizer.ggml.bos_token_id")
    if bos is not None and meta.get("tokenizer.ggml.add_bos_token", whole):
        made.post_processor = TemplateProcessing(single=[tokens[bos], "$A"], special_tokens=[(tokens[bos], bos)])
    return made.to_str()


if __name__ == "__main__":
    try:
        _describe(Path(sys.argv[1]), Path(sys.argv[2]))
    except ValueError as error:
        sys.exit(str(error))
