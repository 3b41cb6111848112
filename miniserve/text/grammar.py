"""Grammars: made of what a request says of its output, and compiled by llguidance. No torch.

The API compiles a grammar to check it, a worker to follow it.
"""

from __future__ import annotations

import json
import re
import threading
from collections import OrderedDict
from collections.abc import Iterable
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.gbnf_to_lark import gbnf_to_lark
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

from miniserve.sampling_params import Grammar
from miniserve.text.grammar_bounds import GrammarError, check_bounds
from miniserve.text.tokenizer import Tokenizer

WHITESPACE = "( |\\r?\\n[ \\t]{0,32})"
"""Between the parts of JSON: one space, or a new line and its indentation. Nothing else in a grammar would stop a small
model from filling its whole answer with blanks."""
MAX_CACHED = 128
MAX_CACHED_CHARS = 4 * 2**20
"""Compiled grammars that are kept: how many, and how many characters they may have had together."""

# Each token: at most some 5 ms (measured, SmolLM2's vocabulary) before the grammar is given up as too complex.
_LIMITS = LLParserLimits(
    step_lexer_fuel=100_000,
    step_max_items=20_000,
    max_lexer_states=20_000,  # of 1 to 2 KB
    max_grammar_size=200_000,
    verbose_errors=False,
)
_LARK = re.compile(r"^[ \t]*(%llguidance\b|start\s*:)", re.MULTILINE)
"""Tells Lark from GBNF. The library's own search for it takes two seconds for 16,000 empty lines, and stops everything
else meanwhile."""


# --- made -----------------------------------------------------------------------------------------------------------


def json_grammar(schema: dict[str, Any], *, strict: bool = False) -> Grammar:
    """The grammar of JSON that fits `schema`. Unless `strict`, `oneOf` is taken for `anyOf`: the parser cannot rule out
    that two alternatives match, and schemas made from code mean alternatives that exclude each other."""
    options = {"whitespace_pattern": WHITESPACE, "coerce_one_of": not strict}
    return Grammar("json_schema", json.dumps({**schema, "x-guidance": options}, ensure_ascii=False))


def choice_grammar(choices: list[str]) -> Grammar:
    """The grammar of one of these texts."""
    return Grammar("lark", "start: " + " | ".join(map(quoted, choices)))


def lark_grammar(text: str) -> Grammar:
    """A grammar that is written in llguidance's Lark, or in llama.cpp's GBNF. Raises `GrammarError`."""
    try:
        return Grammar("lark", text if _LARK.search(text) else gbnf_to_lark(text))
    except Exception as error:  # whatever the library's converter runs into
        raise GrammarError(f"neither Lark nor GBNF: {error}.") from error


def quoted(text: str) -> str:
    """A Lark expression for exactly this text."""
    found = re.sub(r"\\u00([01][0-9a-f])", r"\\x\1", json.dumps(text, ensure_ascii=False))
    return found.replace("\x7f", "\\x7f").replace("%", "\\x25")  # which would begin a directive to `check_bounds`


# --- compiled -------------------------------------------------------------------------------------------------------


class Compiler:
    """Makes matchers of grammars over the vocabulary of one tokenizer. Safe to use from many threads.

    Takes a tenth of a second to make for 50,000 tokens, a second for large vocabularies, and no other thread of the
    process runs meanwhile: make it before requests come. `vocab_size` may pad the tokenizer's, and `eos` are the tokens
    that may end an output (the tokenizer's own if there are none).
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int = 0, eos: Iterable[int] = ()) -> None:
        self.vocab_size = max(vocab_size, tokenizer.vocab_size)
        self._failure = ""
        ends = sorted(eos) or sorted(i for i in tokenizer.eos_token_ids if i < self.vocab_size)
        try:
            self._vocabulary = LLTokenizer(tokenizer.to_json(), n_vocab=self.vocab_size, eos_token=ends or None)
        except Exception as error:  # the library raises nothing more precise
            self._failure = f"llguidance does not understand this model's tokenizer: {error}."
        self._cache: OrderedDict[Grammar, LLMatcher] = OrderedDict()
        self._lock = threading.Lock()

    def compile(self, grammar: Grammar) -> LLMatcher:
        """A matcher of `grammar` at its beginning, the caller's own. Releases the interpreter while it compiles, at
        most some tenths of a second. Raises `GrammarError`."""
        if self._failure:
            raise GrammarError(self._failure)
        with self._lock:
            if found := self._cache.get(grammar):
                self._cache.move_to_end(grammar)
                return found.deep_copy()
        check_bounds(grammar)
        made = LLMatcher(self._vocabulary, _for_llguidance(grammar), limits=_LIMITS, log_level=0)
        if not made.is_error():
            # Much is only found out, and prepared for all copies, with the first mask.
            fill_next_token_bitmask(made, allocate_token_bitmask(1, self.vocab_size))
        if reason := failure(made):
            raise GrammarError(reason)
        with self._lock:
            self._cache[grammar] = made
            while (
                len(self._cache) > MAX_CACHED or sum(len(known.text) for known in self._cache) > MAX_CACHED_CHARS
            ) and len(self._cache) > 1:
                self._cache.popitem(last=False)
            return made.deep_copy()


def failure(matcher: LLMatcher) -> str:
    """Why a matcher cannot go on, as a sentence; empty while it can."""
    if matcher.is_error():
        reason = re.sub(r"<non-verbose/>|<state>.*", "", matcher.get_error(), flags=re.S)
        return " ".join(reason.split()).rstrip(".")[:500] + "."
    if matcher.is_stopped() and not matcher.is_accepting():
        return "no text matches it."
    return ""


def _for_llguidance(grammar: Grammar) -> str:
    match grammar.kind:
        case "json_schema":
            return LLMatcher.grammar_from_json_schema(grammar.text)
        case "regex":
            return LLMatcher.grammar_from_regex(grammar.text)
        case "lark":
            return LLMatcher.grammar_from_lark(grammar.text)
