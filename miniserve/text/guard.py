"""Keeps the content of messages from forging control tokens such as `<|im_end|>` and `<think>`.

Before a chat template is rendered, a sentinel replaces every piece of a message or tool that spells a control token:
private-use characters that no client can guess. In the rendered text the control tokens are those that the template
wrote. What lies between them, with the hidden texts put back, is encoded by a tokenizer that knows no control tokens.
So such content reads as plain text, and content without any gets exactly the tokens that transformers gives it.
"""

import json
import re
import secrets
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any

import tokenizers

from miniserve.sampling_params import ParameterError

_DIGITS = "\ue100\ue101\ue102\ue103\ue104\ue105\ue106\ue107\ue108\ue109"
_HIDE, _SHOW = str.maketrans("0123456789", _DIGITS), str.maketrans(_DIGITS, "0123456789")


def is_control(text: str, special: bool) -> bool:
    """Whether a token steers the model: special, or in brackets. Others (runs of spaces, words) are just text."""
    return bool(text.strip()) and (special or (text[0] in "<[{" and text[-1] in ">]}" and len(text) > 2))


def encode_all(backend: tokenizers.Tokenizer, texts: list[str], add_special_tokens: bool = False) -> list[list[int]]:
    """The token ids of each text. The library's call for one text keeps the GIL, and with it the event loop."""
    return [found.ids for found in backend.encode_batch_fast(texts, add_special_tokens=add_special_tokens)]


class HiddenTexts:
    """The texts of one request that sentinels stand for. These are all private-use characters, so that no template's
    filter (trim, upper, tojson) changes them: U+E000, 80 random bits that are the same in the whole request, the digits
    of the text's number, U+E001."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self._nonce = "".join(chr(0xE100 + secrets.randbelow(1024)) for _ in range(8))

    def new(self, text: str) -> str:
        self.texts.append(text)
        return f"\ue000{self._nonce}{str(len(self.texts) - 1).translate(_HIDE)}\ue001"

    def split(self, text: str) -> list[tuple[str, bool]]:
        """(text, False) for what stands between sentinels and (its text, True) for each one, in order."""
        parts = re.split(f"\ue000{self._nonce}([\ue100-\ue109]+)\ue001", text)
        return [(self.texts[int(p.translate(_SHOW))], True) if i % 2 else (p, False) for i, p in enumerate(parts)]


class Guard:
    """Finds text that is a control token, or that could become one where a template joins two strings (parts of a
    content, a role between brackets): the end of a token at the beginning, the beginning of one at the end."""

    def __init__(self, tokens: Iterable[str]) -> None:
        self.tokens = frozenset(tokens)
        longest = sorted(self.tokens, key=len, reverse=True)
        # Python's regex compiler factors out what the alternatives begin with, so this is one quick scan.
        self._whole = re.compile("|".join(map(re.escape, longest)) or r"(?!)")
        # Word-like ends ("user" of some "[user]x") would mark ordinary words that templates compare.
        self._heads = frozenset(t[:n] for t in self.tokens for n in range(1, len(t)) if not t[0].isalnum())
        self._tails = frozenset(t[n:] for t in self.tokens for n in range(1, len(t)) if not t[-1].isalnum())
        self._reach = max(map(len, self.tokens), default=0) - 1

    def mark(self, text: str, hidden: HiddenTexts) -> str:
        """`text` with sentinels from `hidden` in the place of what it finds."""
        reach = min(self._reach, len(text))
        head = next((n for n in range(reach, 0, -1) if text[:n] in self._tails), 0)
        rest = text[head:]
        tail = next((n for n in range(min(reach, len(rest)), 0, -1) if rest[-n:] in self._heads), 0)
        middle = rest[: len(rest) - tail]
        marked = self._whole.sub(lambda found: hidden.new(found[0]), middle)
        # Hidden texts are numbered in any order, so head and tail may come last.
        return (hidden.new(text[:head]) if head else "") + marked + (hidden.new(rest[-tail:]) if tail else "")


class GuardedEncoder:
    """Hides the control tokens that a request spells, and encodes the rendered text without them. `control` maps the
    ids of all control tokens to their text, `special` are those of them that are special tokens."""

    def __init__(self, backend: tokenizers.Tokenizer, control: Mapping[int, str], special: frozenset[int]) -> None:
        self._backend = backend
        self._control = control
        self._all = Guard(control.values())
        # What the assistant said before may hold its own `<think>`, which templates look for.
        self._special = Guard(text for i, text in control.items() if i in special)
        # Tokens matched after normalization can be spelled in ways that no search for their text finds.
        self._odd_spellings = backend.normalizer is not None and any(
            token.normalized for i, token in backend.get_added_tokens_decoder().items() if i in control
        )

    def hide(self, value: Any, hidden: HiddenTexts, *, own: bool = False) -> Any:
        """A copy of a JSON value, with sentinels for control tokens; in the model's `own` words, special ones alone."""
        if isinstance(value, dict):
            return {self.hide(k, hidden, own=own): self.hide(v, hidden, own=own) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [self.hide(item, hidden, own=own) for item in value]
        if not isinstance(value, str):
            return value
        guard = self._special if own else self._all
        marked = guard.mark(value, hidden)
        if self._odd_spellings and marked == value:
            ids = encode_all(self._backend, [value])[0]
            return hidden.new(value) if any(self._control.get(i) in guard.tokens for i in ids) else value
        return marked

    def encode(self, parts: list[tuple[str, bool]]) -> list[int]:
        """Token ids of (text, was hidden) parts, as `HiddenTexts.split` gives them. Control tokens come only from texts
        that were not hidden. Raises `ParameterError` for a vocabulary that cannot spell a text without one."""
        shown = [text for text, literal in parts if not literal]
        encodings = iter(self._backend.encode_batch(shown, add_special_tokens=False))
        runs, controls = [""], []  # a control token follows on each run of plain text but the last
        for text, literal in parts:
            start = 0
            if not literal:
                encoding = next(encodings)
                for i, (left, right) in zip(encoding.ids, encoding.offsets, strict=True):
                    if i in self._control:
                        runs[-1] += text[start:left]
                        runs.append("")
                        controls.append(i)
                        start = right
            runs[-1] += text[start:]
        first, *rest = self._plain_ids(runs)
        return [*first, *(i for control, ids in zip(controls, rest, strict=True) for i in (control, *ids))]

    def _plain_ids(self, runs: list[str]) -> list[list[int]]:
        """Token ids of texts that hold no control tokens, whatever they spell; the first begins the whole text."""
        start, inner = self._plain_backends
        ids = [*encode_all(start, runs[:1]), *encode_all(inner, runs[1:])]
        for number, run in enumerate(runs):
            if not self._control.keys().isdisjoint(ids[number]):
                # A vocabulary whose merges spell a control token: character by character they cannot.
                ids[number] = [i for character in encode_all(inner, list(run)) for i in character]
                if not self._control.keys().isdisjoint(ids[number]):
                    raise ParameterError("messages", "The text of a message spells a control token of this model.")
        return ids

    @cached_property
    def _plain_backends(self) -> tuple[tokenizers.Tokenizer, tokenizers.Tokenizer]:
        """Tokenizers without control tokens, for the beginning of a text and for its inside. Made when they are first
        needed, since their vocabulary may be big; threads that need them at the same time may each make some."""
        data = json.loads(self._backend.to_str())
        data["added_tokens"] = [token for token in data["added_tokens"] if token["id"] not in self._control]
        # Templates of special tokens may name what is no longer there; they are not applied here anyway.
        data["post_processor"] = None
        start = json.dumps(data)
        # A space before the first word belongs to the beginning of a text, not to every run.
        inner = start.replace('"prepend_scheme": "first"', '"prepend_scheme": "never"')
        backend = tokenizers.Tokenizer.from_str(start)
        return backend, backend if inner == start else tokenizers.Tokenizer.from_str(inner)
