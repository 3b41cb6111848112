"""Structured output: what a request says of the form of its output becomes a grammar, compiled once to check it.

Compiling happens in threads that let the event loop run, few of them, and nobody waits for long.
"""

from __future__ import annotations

import asyncio
import json
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from llguidance.gbnf_to_lark import gbnf_to_lark

from miniserve.api.errors import RETRY_SECONDS, ApiError
from miniserve.api.openai.parameters import GenerationRequest
from miniserve.sampling_params import Grammar, ParameterError
from miniserve.text.grammar import GrammarError, quoted
from miniserve.text.tokenizer import Tokenizer

THREADS = 2
MAX_CHECKING = 64
"""Most requests whose grammars are checked, or wait for it, at a time."""
SECONDS = 5.0
"""The longest that a request waits for it."""
ANY_OBJECT: dict[str, Any] = {"type": "object"}
WHITESPACE = "( |\\r?\\n[ \\t]{0,32})"
"""Between the parts of JSON: one space, or a new line and its indentation. Nothing else in a grammar would stop a small
model from filling its whole answer with blanks."""


_LARK = re.compile(r"^[ \t]*(%llguidance\b|start\s*:)", re.MULTILINE)
"""Tells Lark from GBNF. The library's own search for it takes two seconds for 16,000 empty lines, and stops everything
else meanwhile."""


class GrammarChecks:
    """Compiles grammars over the vocabulary of `tokenizer`, to tell a client what is wrong before anything runs."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._pool = ThreadPoolExecutor(THREADS, "grammar-check")
        self._checking = 0

    async def wanted(self, body: GenerationRequest) -> Grammar | None:
        """What the output of a request must match, checked. Raises `ParameterError`, `ApiError`."""
        if body.format_field is None:
            return None
        return await self.check(await asyncio.to_thread(requested, body), body.format_field)

    async def check(self, grammar: Grammar, param: str) -> Grammar:
        """Return `grammar` if it compiles. Raises `ParameterError` about `param` if it does not, and `ApiError` 503
        where too many others are being checked."""
        if self._checking >= MAX_CHECKING:
            raise _busy()
        self._checking += 1
        job = self._pool.submit(self._compile, grammar)
        try:
            await asyncio.wait_for(asyncio.wrap_future(job), SECONDS)
        except GrammarError as error:
            raise ParameterError(param, f"`{param}` cannot be followed: {error}") from error
        except TimeoutError as error:
            if job.cancelled():  # by then: it had not even begun
                raise _busy() from error
            raise ParameterError(
                param, f"`{param}` takes more than {SECONDS:g} s to compile: make the schema or grammar simpler."
            ) from error
        finally:
            self._checking -= 1
        return grammar

    def _compile(self, grammar: Grammar) -> None:
        self._tokenizer.compiler.compile(grammar)


def requested(body: GenerationRequest) -> Grammar:
    """The grammar of a request that has a format. Slow where that is large: not for the event loop. Raises
    `ParameterError`."""
    if (wanted := body.structured_outputs) is None:
        form = body.response_format.json_schema if body.response_format else None
        return json_grammar(form.schema_, strict=bool(form.strict)) if form else json_grammar(ANY_OBJECT)
    if wanted.regex is not None:
        return Grammar("regex", wanted.regex)
    if wanted.choice is not None:
        return Grammar("lark", "start: " + " | ".join(map(quoted, wanted.choice)))
    if wanted.grammar is not None:
        try:
            return Grammar("lark", wanted.grammar if _LARK.search(wanted.grammar) else gbnf_to_lark(wanted.grammar))
        except Exception as error:  # whatever the library's converter runs into
            raise ParameterError(
                "structured_outputs", f"`structured_outputs.grammar` is neither Lark nor GBNF: {error}."
            ) from error
    if isinstance(wanted.json_, str):
        try:
            schema = json.loads(wanted.json_)
            if isinstance(schema, dict):
                return json_grammar(schema)
        except (ValueError, RecursionError) as error:
            raise ParameterError("structured_outputs", f"`structured_outputs.json` is not JSON: {error}.") from error
        raise ParameterError("structured_outputs", "`structured_outputs.json` must be a JSON schema, an object.")
    return json_grammar(ANY_OBJECT if wanted.json_ is None else wanted.json_)


def json_grammar(schema: dict[str, Any], *, strict: bool = False) -> Grammar:
    """The grammar of JSON that fits `schema`. Unless `strict`, `oneOf` is taken for `anyOf`: the parser cannot rule out
    that two alternatives match, and schemas made from code mean alternatives that exclude each other."""
    options = {"whitespace_pattern": WHITESPACE, "coerce_one_of": not strict}
    return Grammar("json_schema", json.dumps({**schema, "x-guidance": options}, ensure_ascii=False))


def _busy() -> ApiError:
    return ApiError(
        503,
        "Too many schemas and grammars are being checked: try again.",
        code="queue_full",
        headers={"Retry-After": str(RETRY_SECONDS)},
    )
