"""Text in, tokens out, and back: encoding and chat templates. No torch, no transformers.

`tokenizers` and jinja2 load in a tenth of a second where transformers' AutoTokenizer takes more than two, and a
tokenizer.json says all that is needed; transformers is only asked for a model that comes without one. The content of
messages cannot forge control tokens (`guard.py`).
"""

import json
import logging
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Self

import tokenizers
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from miniserve.config import problem, read_object
from miniserve.families import text_model
from miniserve.sampling_params import ParameterError
from miniserve.text.guard import GuardedEncoder, HiddenTexts, encode_all, is_control
from miniserve.text.template import ChatTemplates, Message, find_templates

log = logging.getLogger("miniserve.text")


def byte_alphabet() -> dict[int, str]:
    """Byte -> what stands for it in byte-level vocabularies: in printable Latin-1 itself, else from U+0100 on."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (b for b in range(256) if b not in set(plain))
    return {b: chr(b) for b in plain} | {b: chr(0x100 + i) for i, b in enumerate(others)}


def byte_level_bpe(
    vocab: dict[str, int],
    merges: Iterable[tuple[str, str]],
    special: Iterable[str],
    *,
    use_regex: bool = True,
    before: Sequence[Any] = (),
) -> tokenizers.Tokenizer:
    """A byte-level BPE. `vocab` maps tokens, spelled in `byte_alphabet`, to ids; `special` texts that are not there get
    the next ones. `use_regex` splits text into words as GPT-2 does, after the pre-tokenizers `before`."""
    byte_level = ByteLevel(add_prefix_space=False, use_regex=use_regex)
    made = tokenizers.Tokenizer(BPE(vocab, [*merges]))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([*before, byte_level])
    made.decoder = tokenizers.decoders.ByteLevel()
    made.add_special_tokens([*special])
    return made


class Tokenizer:
    """A model's tokenizer and chat template. Immutable after `load`, safe to use from many threads.

    `vocab_size` is one more than the highest token id (the model's own may be padded beyond). `eos_token_ids` end a
    turn. `special_ids` are the tokens left out of text when special tokens are skipped. `template_text` is the source
    of all templates, and of the checkpoint's response template. `backend` is the library's own tokenizer.
    """

    def __init__(
        self, backend: tokenizers.Tokenizer, folder: Path, settings: dict[str, Any], chat_template: str | None = None
    ) -> None:
        """As `load`. `settings` are what tokenizer_config.json says: the templates see its special tokens."""
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        added = backend.get_added_tokens_decoder()
        self._added = {i: token.content for i, token in added.items()}
        control = {i: token.content for i, token in added.items() if is_control(token.content, token.special)}
        self._control_ids = {text: i for i, text in control.items()}
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self._bytes_of = _byte_reader(backend)
        self.token_bytes = cache(self._token_bytes)
        """The exact bytes a token stands for, special ones included; empty for ids the tokenizer does not know."""
        self._guarded = GuardedEncoder(backend, control, self.special_ids)
        special = read_object(folder / "special_tokens_map.json") | settings
        # Each is its text, or an object around it.
        said = {name: value.get("content") if isinstance(value, dict) else value for name, value in special.items()}
        texts = {name: text for name, text in said.items() if "_token" in name and text and isinstance(text, str)}
        templates = find_templates(folder, settings, chat_template)
        self._templates = ChatTemplates(templates, texts)
        self.template_text = "\n".join(templates.values())
        if response_template := settings.get("response_template"):  # how answers are parsed
            self.template_text += "\n" + json.dumps(response_template, ensure_ascii=False)
        config = text_model(read_object(folder / "config.json"))
        self.model_type = str(config.get("model_type", ""))
        self.eos_token_ids = frozenset(_end_tokens(folder, config, texts, backend))
        if isinstance(rows := config.get("vocab_size"), int) and self.vocab_size > rows:
            last = self.vocab_size - 1
            log.warning("The tokenizer has ids up to %d, the model those below %d: texts with others fail.", last, rows)

    @classmethod
    def load(cls, folder: str | Path, chat_template: str | None = None) -> Self:
        """From a model's folder. `chat_template`: a file or the text of a template to use instead of the model's own.
        Raises `ParameterError` where there is no usable tokenizer or the template is not jinja, and `ConfigError` for a
        file that is no JSON object."""
        folder = Path(folder)
        settings = read_object(folder / "tokenizer_config.json")
        if (path := folder / "tokenizer.json").is_file():
            try:
                backend = tokenizers.Tokenizer.from_file(str(path))
            except Exception as error:  # the library raises nothing more precise
                read_object(path)
                raise ParameterError("model", f"{path} cannot be read: {_line(error)}.") from error
        else:  # vocab.json and merges.txt, or tokenizer.model
            from transformers import AutoTokenizer

            try:
                converted = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
                backend, settings = converted.backend_tokenizer, settings | converted.special_tokens_map
            except Exception as error:  # whatever the conversion of an unknown format runs into
                said = problem("text.no_tokenizer", folder=folder, reason=_line(error))
                raise ParameterError("model", said) from error
        return cls(backend, folder, settings, chat_template)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a raw prompt. Control tokens spelled in it are parsed; it is the client's own prompt."""
        return encode_all(self.backend, [text], add_special_tokens)[0]

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        """The text of a whole sequence; bytes that are no UTF-8 become U+FFFD."""
        # As with `encode`: the call for one keeps the GIL.
        return str(self.backend.decode_batch([ids], skip_special_tokens=skip_special_tokens)[0])

    def _token_bytes(self, token: int) -> bytes:
        if token in self._added:
            return self._added[token].encode()
        return self._bytes_of(self.backend.id_to_token(token) or "") if 0 <= token < self.vocab_size else b""

    def control_id(self, text: str) -> int | None:
        return self._control_ids.get(text)

    def rendered(self, messages: list[Message]) -> str | None:
        """A conversation of plain text as the chat template renders it; None where it refuses."""
        try:
            return self._templates.render(messages, None, messages[-1]["role"] != "assistant", "", {})
        except ParameterError:
            return None

    def chat(
        self,
        messages: list[Message],
        *,
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: dict[str, Any] | None = None,
    ) -> list[int]:
        """Token ids of a conversation rendered by the chat template, whose further variables are `template_kwargs`.
        `continue_final_message` leaves the last message open, for the model to go on with. Raises `ParameterError`."""
        if not messages:
            raise ParameterError("messages", "`messages` must hold at least one message.")
        if continue_final_message and add_generation_prompt:
            raise ParameterError("continue_final_message", problem("text.continued_or_begun"))
        hidden = HiddenTexts()
        # Templates expect a missing key where a message has null.
        said = [{key: value for key, value in message.items() if value is not None} for message in messages]
        text = self._templates.render(
            [self._guarded.hide(message, hidden, own=message.get("role") == "assistant") for message in said],
            self._guarded.hide(tools, hidden) if tools else None,
            add_generation_prompt,
            hidden.new("") if continue_final_message else "",
            self._guarded.hide(template_kwargs or {}, hidden),
        )
        if not hidden.texts:
            return self.encode(text, add_special_tokens=False)
        return self._guarded.encode(hidden.split(text))


def _end_tokens(folder: Path, config: dict[str, Any], texts: dict[str, str], backend: tokenizers.Tokenizer) -> set[int]:
    """The tokens that end a turn: all that any of the folder's files calls so, by id or by text."""
    said = {
        "generation_config.json": read_object(folder / "generation_config.json").get("eos_token_id"),
        "config.json": config.get("eos_token_id"),
        "the tokenizer's files": [text for name, text in texts.items() if name in ("eos_token", "eot_token")],
    }
    ends: dict[str, set[int]] = {}
    for source, named in said.items():
        tokens = named if isinstance(named, list) else [named]
        ids = {backend.token_to_id(token) if isinstance(token, str) else token for token in tokens}
        if known := {token for token in ids if type(token) is int and token >= 0}:
            ends[source] = known
    every = set().union(*ends.values())
    if ends and every != next(iter(ends.values())):  # those that transformers goes by
        log.warning("The model's files call different tokens the end: %s. Each of them ends a turn.", ends)
    return every


def _line(error: Exception) -> str:
    """What an error of another library says, in one line."""
    return " ".join(str(error).split())[:300].rstrip(".")


def _byte_reader(backend: tokenizers.Tokenizer) -> Callable[[str], bytes]:
    """How the text of a token in the vocabulary becomes bytes, judged by the tokenizer's decoder."""
    decoder = repr(backend.decoder)
    if "ByteLevel" in decoder:
        byte_of = {character: byte for byte, character in byte_alphabet().items()}
        # What is not spelled in bytes stands for itself.
        return lambda text: bytes(map(byte_of.__getitem__, text)) if byte_of.keys() >= {*text} else text.encode()
    if "ByteFallback" in decoder or "\u2581" in decoder:

        def sentencepiece(text: str) -> bytes:
            if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
                return bytes([int(text[3:5], 16)])
            return text.replace("\u2581", " ").encode()

        return sentencepiece
    return lambda text: text.encode()
