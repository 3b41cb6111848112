"""Keeps the content of messages from forging control tokens (`text/tokenizer.py`): finding and hiding them."""

from __future__ import annotations

import re
import secrets
from collections.abc import Iterable


def is_control(text: str, special: bool) -> bool:
    """Whether a token steers the model: special, or in brackets. Others (runs of spaces, words) are just text."""
    return bool(text.strip()) and (special or (text[0] in "<[{" and text[-1] in ">]}" and len(text) > 2))


class Guard:
    """Finds text that is a control token, or that could become one beside other text.

    A string that ends with the beginning of a token, or begins with the end of one, is marked there too: a template
    may join two strings (parts of a content, a role between brackets).
    """

    def __init__(self, tokens: Iterable[str]) -> None:
        self.tokens = frozenset(tokens)
        longest = sorted(self.tokens, key=len, reverse=True)
        # Python's regex compiler factors out what the alternatives begin with, so this is one quick scan.
        self._whole = re.compile("|".join(map(re.escape, longest)) or r"(?!)")
        # Word-like ends ("user" of some "[user]x") would mark ordinary words that templates compare.
        self._heads = frozenset(t[:n] for t in self.tokens for n in range(1, len(t)) if not t[0].isalnum())
        self._tails = frozenset(t[n:] for t in self.tokens for n in range(1, len(t)) if not t[-1].isalnum())
        self._reach = max(map(len, self.tokens), default=0) - 1

    def mark(self, text: str, pieces: Pieces) -> str:
        """`text` with sentinels from `pieces` in the place of what it finds."""
        reach = min(self._reach, len(text))
        head = next((n for n in range(reach, 0, -1) if text[:n] in self._tails), 0)
        rest = text[head:]
        tail = next((n for n in range(min(reach, len(rest)), 0, -1) if rest[-n:] in self._heads), 0)
        middle = rest[: len(rest) - tail]
        marked = self._whole.sub(lambda found: pieces.new(found[0]), middle)
        # Pieces are numbered in any order, so head and tail may come last.
        return (pieces.new(text[:head]) if head else "") + marked + (pieces.new(rest[-tail:]) if tail else "")


class Pieces:
    """The texts of one request that sentinels stand for.

    A sentinel is all private-use characters, so that no template's filter (trim, upper, tojson) changes it: U+E000,
    80 random bits that are the same in the whole request, the number of the piece, U+E001.
    """

    BASE = 0xE100
    DIGITS = 1024

    def __init__(self) -> None:
        self.texts: list[str] = []
        self._nonce = ""

    def new(self, text: str) -> str:
        """The sentinel of a further text."""
        if not self._nonce:
            self._nonce = "".join(chr(self.BASE + secrets.randbelow(self.DIGITS)) for _ in range(8))
        self.texts.append(text)
        high, low = divmod(len(self.texts) - 1, self.DIGITS)
        top, high = divmod(high, self.DIGITS)
        return f"\ue000{self._nonce}{''.join(chr(self.BASE + digit) for digit in (top, high, low))}\ue001"

    def split(self, text: str) -> list[tuple[str, bool]]:
        """(text, False) for what stands between sentinels and (its text, True) for each one, in order."""
        digit = f"[{chr(self.BASE)}-{chr(self.BASE + self.DIGITS - 1)}]"
        parts = re.split(f"\ue000{self._nonce}({digit}{{3}})\ue001", text)
        found = [(part, False) for part in parts]
        for i in range(1, len(parts), 2):
            top, high, low = (ord(digit) - self.BASE for digit in parts[i])
            found[i] = (self.texts[(top * self.DIGITS + high) * self.DIGITS + low], True)
        return found
