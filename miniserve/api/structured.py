"""Structured output: a request's format becomes a grammar, compiled once to check it, in threads of their own."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from miniserve.api.errors import RETRY_SOON, ApiError
from miniserve.api.openai.parameters import GenerationRequest
from miniserve.config import problem
from miniserve.sampling_params import Grammar, ParameterError
from miniserve.text.grammar import Compiler, GrammarError, json_grammar, lark_grammar, quoted

THREADS = 2
MAX_CHECKING = 64
"""Most requests whose grammars are checked, or wait for it, at a time."""
SECONDS = 5.0
"""The longest that a request waits for it."""
ANY_OBJECT: dict[str, Any] = {"type": "object"}


class GrammarChecks:
    """Compiles grammars, so that a client learns what is wrong before anything runs."""

    def __init__(self, compiler: Compiler) -> None:
        self._compiler = compiler
        self._pool = ThreadPoolExecutor(THREADS, "grammar-check")
        self._room = asyncio.Semaphore(MAX_CHECKING)

    async def check(self, grammar: Grammar, param: str) -> None:
        """Raises `ParameterError` about `param` if `grammar` does not compile, `ApiError` 503 where too many wait."""
        if self._room.locked():
            raise _busy()
        async with self._room:
            job = self._pool.submit(self._compiler.compile, grammar)
            try:
                await asyncio.wait_for(asyncio.wrap_future(job), SECONDS)
            except GrammarError as error:
                raise ParameterError(param, f"`{param}` cannot be followed: {error}") from error
            except TimeoutError as error:
                if job.cancelled():  # by then: it had not even begun
                    raise _busy() from error
                raise ParameterError(param, problem("api.slow_grammar", param=param, seconds=SECONDS)) from error


def requested(body: GenerationRequest, relaxed: set[str]) -> Grammar:
    """The grammar of a request that has a format. What it cannot hold of a schema that is not strict is left out and
    added to `relaxed`. Slow where the format is large: not for the event loop. Raises `ParameterError`."""

    def of_schema(schema: dict[str, Any], at: str) -> Grammar:
        found: set[str] = set()
        grammar = json_grammar(schema, relaxed=found)
        relaxed.update(f"{at}.{key}" for key in found)
        return grammar

    if (wanted := body.structured_outputs) is None:
        form = body.response_format.form if body.response_format else None
        schema: Any = ANY_OBJECT if form is None else form.schema_
        if form is not None and form.strict:
            return json_grammar(schema, strict=True)
        return of_schema(schema, "response_format.schema")
    if wanted.regex is not None:
        return Grammar("regex", wanted.regex)
    if wanted.choice is not None:
        return Grammar("lark", "start: " + " | ".join(map(quoted, wanted.choice)))
    if wanted.grammar is not None:
        return lark_grammar(wanted.grammar)
    return of_schema(ANY_OBJECT if wanted.json_ is None else wanted.json_, "structured_outputs.json")


def _busy() -> ApiError:
    return ApiError(503, problem("api.busy"), code="queue_full", headers=RETRY_SOON)
