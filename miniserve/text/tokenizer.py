"""Text in, tokens out, and back: encoding, chat templates, and text that streams. No torch, no transformers.

`tokenizers` and jinja2 load in a tenth of a second where transformers' AutoTokenizer takes three, and a tokenizer.json
says all that is needed; transformers is only asked for a model that comes without one.

**Message content cannot forge special tokens.** Before a chat template is rendered, every piece of a message or tool
that spells a control token (`<|im_end|>`, `<think>`) is replaced by a sentinel of private-use characters that no client
can guess. In the rendered text the control tokens are those the template wrote; what lies between them, with the
pieces put back, is encoded by a tokenizer that knows no control tokens. So such content reads as plain text, and
content without any gets exactly the tokens that transformers gives it.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from miniserve.sampling_params import ParameterError
from miniserve.text.guard import Guard, Pieces, is_control
from miniserve.text.template import ChatTemplates, Message, find_templates, read_json

if TYPE_CHECKING:
    import tokenizers

    from miniserve.text.grammar import Compiler


def byte_alphabet() -> dict[int, str]:
    """Byte -> the printable character that stands for it in byte-level vocabularies.

    Printable Latin-1 stands for itself; the others take the characters from U+0100 on, in order.
    """
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (b for b in range(256) if b not in set(plain))
    return {b: chr(b) for b in plain} | {b: chr(0x100 + i) for i, b in enumerate(others)}


class Tokenizer:
    """A model's tokenizer and chat template. Immutable after `load`, safe to use from many threads.

    `vocab_size` is one more than the highest token id (the model's own may be padded beyond). `eos_token_ids` end a
    turn. `special_ids` are the tokens left out of text when special tokens are skipped. `has_template` tells whether
    `chat` can work; `template_text` is the source of all templates, and of the checkpoint's response template.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        eos_token_ids: Iterable[int] = (),
        bos_token_id: int | None = None,
        templates: dict[str, str] | None = None,
        special_texts: dict[str, str] | None = None,
        model_type: str = "",
        response_template: Any = None,
    ) -> None:
        """`templates` maps names (`default`, `tool_use`) to jinja text; `special_texts` maps `bos_token` and the like
        to their text, for the templates. `response_template` is what the checkpoint says of how answers are parsed."""
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        added = backend.get_added_tokens_decoder()
        self._added = {i: token.content for i, token in added.items()}
        self._control = {i: token.content for i, token in added.items() if is_control(token.content, token.special)}
        self._control_ids = {text: i for i, text in self._control.items()}
        self.special_ids = frozenset(i for i, token in added.items() if token.special)
        self.eos_token_ids = frozenset(eos_token_ids)
        self.bos_token_id = bos_token_id
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self._bytes: dict[int, bytes] = {}
        self._bytes_of = _byte_reader(backend)
        self._lock = threading.Lock()
        self._templates = ChatTemplates(templates or {}, special_texts or {})
        self.model_type = model_type
        self.template_text = "\n".join((templates or {}).values())
        if response_template:
            self.template_text += "\n" + json.dumps(response_template, ensure_ascii=False)
        # Tokens matched after normalization can be spelled in ways that no search for their text finds.
        self._odd_spellings = backend.normalizer is not None and any(
            token.normalized for i, token in added.items() if i in self._control
        )
        self._all_guard = Guard(self._control.values())
        # What the assistant said before may hold its own `<think>`, which templates look for.
        self._special_guard = Guard(self._control[i] for i in self._control if i in self.special_ids)

    @classmethod
    def load(cls, folder: str | Path, chat_template: str | None = None) -> Tokenizer:
        """From a model's folder. `chat_template`: a file or the text of a template to use instead of the model's own.

        Raises `ParameterError` where there is no usable tokenizer or the template is not jinja.
        """
        import tokenizers

        folder = Path(folder)
        settings = read_json(folder / "tokenizer_config.json")
        if (folder / "tokenizer.json").is_file():
            try:
                backend = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
            except Exception as error:  # the library raises nothing more precise
                raise ParameterError("model", f"{folder}/tokenizer.json cannot be read: {error}.") from error
        else:
            backend, settings = _from_transformers(folder, settings)
        texts = {name: text for name, value in settings.items() if (text := _token_text(value)) and "_token" in name}
        ids: dict[str, int | None] = {
            name: backend.token_to_id(texts[name]) for name in ("bos_token", "eos_token") if name in texts
        }
        configs = [read_json(folder / name) for name in ("generation_config.json", "config.json")]

        def first(key: str) -> Any:
            found = (config[key] for config in configs if config.get(key) is not None)
            return next(found, ids.get(key.removesuffix("_id")))

        eos = first("eos_token_id")
        return cls(
            backend,
            eos_token_ids=[] if eos is None else eos if isinstance(eos, list) else [eos],
            bos_token_id=ids.get("bos_token", first("bos_token_id")),
            templates=find_templates(folder, settings, chat_template),
            special_texts=texts,
            model_type=str(configs[1].get("model_type", "")),
            response_template=settings.get("response_template"),
        )

    # --- text and tokens ---

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a raw prompt. Control tokens spelled in it are parsed; it is the client's own prompt."""
        return _ids(self._backend, [text], add_special_tokens)[0]

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        """The text of a whole sequence; bytes that are no UTF-8 become U+FFFD."""
        # As with `encode`: the call for one keeps the GIL.
        return str(self._backend.decode_batch([ids], skip_special_tokens=skip_special_tokens)[0])

    def token_bytes(self, token: int) -> bytes:
        """The exact bytes a token stands for, special ones included; empty for ids the tokenizer does not know."""
        found = self._bytes.get(token)
        if found is None:
            if (added := self._added.get(token)) is not None:
                found = added.encode()
            else:
                text = self._backend.id_to_token(token) if 0 <= token < self.vocab_size else None
                found = b"" if text is None else self._bytes_of(text)
            self._bytes[token] = found
        return found

    def token_text(self, token: int) -> str:
        """A token by itself as text, as logprobs report it; a part of a character becomes U+FFFD."""
        return self.token_bytes(token).decode("utf-8", "replace")

    def control_id(self, text: str) -> int | None:
        """The control token that is written so, if the model has one."""
        return self._control_ids.get(text)

    # --- grammars ---

    @property
    def compiler(self) -> Compiler:
        """What compiles grammars over this vocabulary. Slow the first time: half a second, in which no other thread of
        this process runs."""
        with self._lock:
            return self._compiler

    @cached_property
    def _compiler(self) -> Compiler:
        from miniserve.text.grammar import Compiler

        return Compiler(self)

    def to_json(self) -> str:
        """All of it as a tokenizer.json."""
        return self._backend.to_str()

    # --- chat ---

    @property
    def has_template(self) -> bool:
        """Whether the model has a chat template."""
        return bool(self._templates)

    def chat(
        self,
        messages: list[Message],
        *,
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: dict[str, Any] | None = None,
    ) -> list[int]:
        """Token ids of a conversation rendered by the chat template.

        `continue_final_message` leaves the last message open, for the model to go on with. `template_kwargs` are
        further variables of the template (`enable_thinking`). Raises `ParameterError`.
        """
        if not messages:
            raise ParameterError("messages", "`messages` must hold at least one message.")
        if continue_final_message and add_generation_prompt:
            raise ParameterError(
                "continue_final_message",
                "`continue_final_message` needs `add_generation_prompt` false: a message is either continued or begun.",
            )
        pieces = Pieces()
        text = self._templates.render(
            [self._guarded_message(message, pieces) for message in messages],
            self._guarded(tools, self._all_guard, pieces) if tools else None,
            add_generation_prompt,
            pieces.new("") if continue_final_message else "",
            self._guarded(template_kwargs or {}, self._all_guard, pieces),
        )
        if not pieces.texts:
            return self.encode(text, add_special_tokens=False)
        return self._encode_pieces(pieces.split(text))

    # --- no forged control tokens ---

    def _guarded_message(self, message: Message, pieces: Pieces) -> Message:
        guard = self._special_guard if message.get("role") == "assistant" else self._all_guard
        # Templates expect a missing key where APIs send null.
        return self._guarded({key: value for key, value in message.items() if value is not None}, guard, pieces)

    def _guarded(self, value: Any, guard: Guard, pieces: Pieces) -> Any:
        """A copy of `value` in which sentinels stand for all that spells a control token."""
        if isinstance(value, str):
            marked = guard.mark(value, pieces)
            if self._odd_spellings and marked == value and self._spells_control(value, guard):
                return pieces.new(value)
            return marked
        if isinstance(value, dict):
            return {self._guarded(k, guard, pieces): self._guarded(v, guard, pieces) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [self._guarded(item, guard, pieces) for item in value]
        return value

    def _spells_control(self, text: str, guard: Guard) -> bool:
        return any(self._control.get(i) in guard.tokens for i in _ids(self._backend, [text])[0])

    def _encode_pieces(self, parts: list[tuple[str, bool]]) -> list[int]:
        """Token ids of (text, written by the client as a control token) parts: only the others may hold any."""
        parts = [(text, literal) for text, literal in parts if text]
        texts = [text for text, literal in parts if not literal]
        encodings = iter(self._backend.encode_batch(texts, add_special_tokens=False))
        found: list[str | int] = []  # runs of plain text and the control tokens between them
        run: list[str] = []

        def end_run() -> None:
            if text := "".join(run):
                found.append(text)
                run.clear()

        for text, literal in parts:
            start = 0
            if not literal:
                encoding = next(encodings)
                for i, (left, right) in zip(encoding.ids, encoding.offsets, strict=True):
                    if i in self._control:
                        run.append(text[start:left])
                        end_run()
                        found.append(i)
                        start = right
            run.append(text[start:])
        end_run()
        runs = [item for item in found if isinstance(item, str)]
        plain = iter(self._plain_ids(runs, first=runs[:1] == found[:1]))
        return [i for item in found for i in (next(plain) if isinstance(item, str) else (item,))]

    def _plain_ids(self, runs: list[str], first: bool) -> list[list[int]]:
        """Token ids of texts that hold no control tokens, whatever they spell.

        `first` says that the first of them begins the whole text.
        """
        start, inner = self._plain
        ids = [*_ids(start, runs[:first]), *_ids(inner, runs[first:])]
        for number, run in enumerate(runs):
            if not self._control.keys().isdisjoint(ids[number]):
                # A vocabulary whose merges spell a control token: character by character they cannot.
                ids[number] = [i for character in _ids(inner, list(run)) for i in character]
                if not self._control.keys().isdisjoint(ids[number]):
                    raise ParameterError("messages", "The text of a message spells a control token of this model.")
        return ids

    @property
    def _plain(self) -> tuple[tokenizers.Tokenizer, tokenizers.Tokenizer]:
        # Copies of a big vocabulary: not made before somebody needs them, and then once.
        with self._lock:
            return self._plain_backends

    @cached_property
    def _plain_backends(self) -> tuple[tokenizers.Tokenizer, tokenizers.Tokenizer]:
        """Tokenizers without control tokens, for the beginning of a text and for its inside."""
        import tokenizers

        data = json.loads(self._backend.to_str())
        data["added_tokens"] = [token for token in data["added_tokens"] if token["id"] not in self._control]
        # Templates of special tokens may name what is no longer there; they are not applied here anyway.
        data["post_processor"] = None
        start = json.dumps(data)
        # A space before the first word belongs to the beginning of a text, not to every run.
        inner = start.replace('"prepend_scheme": "first"', '"prepend_scheme": "never"')
        backend = tokenizers.Tokenizer.from_str(start)
        return backend, backend if inner == start else tokenizers.Tokenizer.from_str(inner)


def _ids(backend: tokenizers.Tokenizer, texts: list[str], add_special_tokens: bool = False) -> list[list[int]]:
    """The token ids of each text. The library's call for one text keeps the GIL, and with it the event loop."""
    return [found.ids for found in backend.encode_batch_fast(texts, add_special_tokens=add_special_tokens)]


# --- reading a model's folder ---------------------------------------------------------------------------------------


def _token_text(value: Any) -> str | None:
    """A special token in tokenizer_config.json is its text or an object around it."""
    text = value.get("content") if isinstance(value, dict) else value
    return text if isinstance(text, str) else None


def _from_transformers(folder: Path, settings: dict[str, Any]) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """For folders without tokenizer.json (vocab.json and merges.txt, tokenizer.model): transformers converts them."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        backend = tokenizer.backend_tokenizer
    except Exception as error:  # whatever the conversion of an unknown format runs into
        raise ParameterError(
            "model", f"{folder} has no tokenizer.json, and transformers finds none: {error}"
        ) from error
    return backend, {**settings, **tokenizer.special_tokens_map}


def _byte_reader(backend: tokenizers.Tokenizer) -> Callable[[str], bytes]:
    """How the text of a token in the vocabulary becomes bytes, judged by the tokenizer's decoder."""
    decoder = repr(backend.decoder)
    if "ByteLevel" in decoder:
        byte_of = {character: byte for byte, character in byte_alphabet().items()}

        def byte_level(text: str) -> bytes:
            try:
                return bytes([byte_of[character] for character in text])
            except KeyError:  # not a spelling in bytes
                return text.encode()

        return byte_level
    if "ByteFallback" in decoder or "\u2581" in decoder:

        def sentencepiece(text: str) -> bytes:
            if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
                return bytes([int(text[3:5], 16)])
            return text.replace("\u2581", " ").encode()

        return sentencepiece
    return lambda text: text.encode()
