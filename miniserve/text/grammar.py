"""Grammars: made of what a request says of its output, and compiled by llguidance. No torch.

The API compiles a grammar to check it, a worker to follow it. llguidance bounds most of what a grammar may cost:
expressions are derived as they are needed, with so much fuel for each token, and rows of its parser hold so many items.
`check_bounds` refuses what it does not bound, before anything is compiled.
"""

import json
import math
import re
import threading
from collections import OrderedDict
from decimal import Decimal
from typing import Any

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, grammar_from
from llguidance.gbnf_to_lark import gbnf_to_lark
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

from miniserve.config import problem, tables
from miniserve.sampling_params import Grammar, ParameterError
from miniserve.text.messages import levels
from miniserve.text.schemas import held
from miniserve.text.tokenizer import Tokenizer

WHITESPACE = "( |\\r?\\n[ \\t]{0,32})"
"""Between parts of JSON: a space, or a new line with indentation. A small model might fill its answer with blanks."""
TABLES = tables("text/grammar.toml")
BOUNDS: dict[str, int] = TABLES["bounds"]
_LIMITS = LLParserLimits(**TABLES["limits"], verbose_errors=False)
_LARK = re.compile(r"^[ \t]*(%llguidance\b|start\s*:)", re.MULTILINE)
"""What makes a text Lark, not GBNF. The library's own search blocks all else for 2 s where 16,000 lines are empty."""
_JSON = re.compile(r"%json\s*")
_PLAIN = re.compile(r'(?://|#)[^\n]*|"(?:\\.|[^"\\])*"?|/(?:\\.|[^/\\])+/?', re.DOTALL)
"""Comments, strings and expressions of Lark, as llguidance reads them. What is not closed it refuses; looking for the
end of such again and again would take more than a second."""


class GrammarError(ValueError):
    """A grammar that cannot be followed; the message says why, in a sentence."""


def json_grammar(schema: dict[str, Any], *, strict: bool = False, relaxed: set[str] | None = None) -> Grammar:
    """The grammar of JSON that fits `schema`. Unless `strict`, `oneOf` is taken for `anyOf`: the parser cannot rule out
    that two alternatives match, and schemas made from code mean alternatives that exclude each other. Keywords that
    cannot be held are left out and added to `relaxed`; without it the grammar will not compile."""
    options = {"whitespace_pattern": WHITESPACE, "coerce_one_of": not strict}
    made = {**held(schema, schema, relaxed), "x-guidance": options}
    return Grammar("json_schema", json.dumps(made, ensure_ascii=False))


def lark_grammar(text: str) -> Grammar:
    """A grammar that is written in llguidance's Lark, or in llama.cpp's GBNF. Raises `ParameterError`."""
    try:
        return Grammar("lark", text if _LARK.search(text) else gbnf_to_lark(text))
    except Exception as error:  # whatever the library's converter runs into
        raise ParameterError("structured_outputs", problem("text.no_grammar", error=error)) from error


def quoted(text: str) -> str:
    found = re.sub(r"\\u00([01][0-9a-f])", r"\\x\1", json.dumps(text, ensure_ascii=False))
    return found.replace("\x7f", "\\x7f").replace("%", "\\x25")  # which would begin a directive to `check_bounds`


class Compiler:
    """Makes matchers of grammars over the vocabulary of one tokenizer, which `vocab_size` may pad. Safe to use from
    many threads. To make one takes a tenth of a second for 50,000 tokens, a second for large vocabularies, and no other
    thread of the process runs meanwhile: make it before requests come."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int = 0) -> None:
        self.vocab_size = max(vocab_size, tokenizer.vocab_size)
        self._failure = ""
        ends = sorted(i for i in tokenizer.eos_token_ids if i < self.vocab_size)
        try:
            self._vocabulary = LLTokenizer(tokenizer.backend.to_str(), n_vocab=self.vocab_size, eos_token=ends or None)
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
        made = LLMatcher(self._vocabulary, grammar_from(grammar.kind, grammar.text), limits=_LIMITS, log_level=0)
        if not made.is_error():
            # Much is only found out, and prepared for all copies, with the first mask.
            fill_next_token_bitmask(made, allocate_token_bitmask(1, self.vocab_size))
        if reason := failure(made):
            raise GrammarError(reason)
        with self._lock:
            self._cache[grammar] = made
            chars = sum(len(known.text) for known in self._cache)
            while len(self._cache) > 1 and (len(self._cache) > BOUNDS["cached"] or chars > BOUNDS["cached_chars"]):
                chars -= len(self._cache.popitem(last=False)[0].text)
            return made.deep_copy()


def failure(matcher: LLMatcher) -> str:
    """Why a matcher cannot go on, as a sentence; empty while it can."""
    if matcher.is_error():
        reason = re.sub(r"<non-verbose/>|<state>.*", "", matcher.get_error(), flags=re.S)
        return " ".join(reason.split()).rstrip(".")[:500] + "."
    if matcher.is_stopped() and not matcher.is_accepting():
        return "no text matches it."
    return ""


def check_bounds(grammar: Grammar) -> None:
    """Raises `GrammarError` for a grammar that is too large to be tried."""
    text, most = grammar.text, TABLES["chars"][grammar.kind]
    if len(text) > most:
        raise GrammarError(f"it has {len(text)} characters, and at most {most} are allowed.")
    if grammar.kind == "json_schema":
        _check_schema(_parsed(text, 0)[0])
    elif grammar.kind == "lark":
        rules, end = "", 0
        while found := _JSON.search(text, end):
            rules += text[end : found.start()] + " "
            schema, end = _parsed(text, found.end())
            _check_schema(schema)
        rules += text[end:]
        if len(rules) > (most := BOUNDS["rule_chars"]):
            raise GrammarError(f"its rules have {len(rules)} characters, and at most {most} are allowed.")
        if re.search("[&~]", _PLAIN.sub("", rules)):
            # Whether such a term matches anything at all may take for ever to find out.
            raise GrammarError("the operators & and ~ are not allowed: write the expression without them.")


def _parsed(text: str, start: int) -> tuple[Any, int]:
    try:
        return json.JSONDecoder().raw_decode(text, start)
    except (ValueError, RecursionError) as error:
        raise GrammarError(f"a schema is not valid JSON: {error}.") from error


def _check_schema(schema: Any) -> None:
    """Raises `GrammarError` for what llguidance's own limits do not stop in time."""
    properties, named_by_pattern, multiple = 0, 0, 1
    different: set[str] = set()
    combined = False
    for depth, value in levels(schema):
        if depth > BOUNDS["depth"]:
            raise GrammarError(f"the schema is nested more than {BOUNDS['depth']} levels deep.")
        if not isinstance(value, dict):
            continue
        if isinstance(found := value.get("properties"), dict):
            properties += len(found)
        patterns = [*found] if isinstance(found := value.get("patternProperties"), dict) else []
        named_by_pattern += len(patterns)
        if isinstance(pattern := value.get("pattern"), str):
            patterns.append(pattern)
        different |= set(patterns)
        # Beside a pattern, those of a reference or of alternatives count, too.
        combined |= "allOf" in value or ("pattern" in value and not value.keys().isdisjoint(("$ref", "anyOf", "oneOf")))
        if any(len(pattern) > BOUNDS["pattern_chars"] for pattern in patterns):
            raise GrammarError(f"a pattern has more than {BOUNDS['pattern_chars']} characters.")
        factor = value.get("multipleOf")
        if isinstance(factor, int | float) and not isinstance(factor, bool) and factor > 0:
            digits = Decimal(str(factor)).normalize().as_tuple().digits
            multiple = math.lcm(multiple, int("".join(map(str, digits))))
            if multiple > BOUNDS["multiple"]:
                raise GrammarError(f"the least common multiple of all `multipleOf` is above {BOUNDS['multiple']}.")
    counts = {"combined": combined and len(different), "named_by_pattern": named_by_pattern, "properties": properties}
    for name, row in TABLES["counted"].items():
        if counts[name] > row["most"]:
            raise GrammarError(f"the schema has {counts[name]} {row['what']}: at most {row['most']} are allowed.")
