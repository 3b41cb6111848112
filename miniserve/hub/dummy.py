"""A folder that stands in for a model without its files: true config.json, made-up tokenizer, no weights.

With `--load-format dummy` the shape of a model is all that is measured. The tokenizer spells text in bytes (ids 0 to
255) and shows every other id as a word of its own, so that the API works and each generated token is visible.
"""

import hashlib
import json
from functools import partial
from pathlib import Path
from typing import Any

from miniserve.config import make_once
from miniserve.families import text_model
from miniserve.text.tokenizer import byte_alphabet, byte_level_bpe

TEMPLATE = (
    "{% for message in messages %}{{ message['role'] ~ ': ' ~ message['content'] ~ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)


def make_folder(root: Path, alias: str, preset: dict[str, Any]) -> Path:
    """A folder under `root` made from the preset's `config` and `generation_config`, or the one made before."""
    config, generation = text_model(preset["config"]), preset["generation_config"]
    named = {"bos_token": config.get("bos_token_id"), "eos_token": generation["eos_token_id"]}
    firsts = {name: ids[0] if isinstance(ids, list) else ids for name, ids in named.items() if ids is not None}
    files = {
        "config.json": preset["config"],
        "generation_config.json": generation,
        "tokenizer.json": tokenizer(config["vocab_size"], {i: f"<|{name}|>" for name, i in firsts.items()}),
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "chat_template": TEMPLATE,
            **{name: f"<|{name}|>" for name in firsts},
        },
    }
    texts = {name: json.dumps(data) for name, data in files.items()}
    # Named after its content, so that it never changes under a process that reads it.
    return make_once(root / f"{alias}-{hashlib.sha256(repr(texts).encode()).hexdigest()[:8]}", partial(_write, texts))


def _write(texts: dict[str, str], out: Path) -> None:
    out.mkdir()
    for name, text in texts.items():
        (out / name).write_text(text, "utf-8")


def tokenizer(vocab_size: int, special: dict[int, str]) -> dict[str, Any]:
    """A tokenizer.json of `vocab_size` tokens: bytes, then words named after their id; `special` maps id to text."""
    # The special ids of some models lie among the first 256: the byte that stood there takes the last ids instead.
    spare = iter(range(vocab_size - 1, -1, -1))
    alphabet = byte_alphabet()
    vocab: dict[str, int] = {}
    for byte in range(256):
        vocab[alphabet[byte]] = byte if byte not in special else next(i for i in spare if i not in special)
    taken = set(vocab.values()) | special.keys()
    vocab |= {f"\u0120t{i}": i for i in range(vocab_size) if i not in taken}
    return byte_level_bpe(vocab | {text: i for i, text in special.items()}, [], special, use_regex=False)
