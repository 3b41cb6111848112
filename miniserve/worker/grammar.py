"""Grammars on a worker: compiled beside the step loop, followed token by token."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from llguidance import LLMatcher

from miniserve.sampling_params import Grammar, ParameterError
from miniserve.text.grammar import Compiler, GrammarError, failure

THREADS = 2
"""That compile: one grammar that takes long does not hold up all others."""


@dataclass
class Matcher:
    """Where one output stands in its grammar; `error` is a sentence that says why it cannot go on, if it cannot."""

    matcher: LLMatcher
    vocab_size: int
    error: str = ""
    followed: int = 0

    def follow(self, outputs: list[int]) -> None:
        """Take in what is new of all `outputs`: so it goes on after a handoff or a crash from what there is."""
        fresh = outputs[self.followed :]
        self.followed = len(outputs)
        if not self.error and not self.matcher.consume_tokens(list(fresh)):
            self.error = failure(self.matcher)


class Grammars:
    """Compiles for one worker. `make` is called once, in a thread; its `ParameterError` fails all grammars."""

    def __init__(self, make: Callable[[], Compiler]) -> None:
        self._pool = ThreadPoolExecutor(THREADS, "grammar")
        self._make_compiler = make
        self._compiler: Future[Compiler] | None = None

    def prepare(self) -> Future[Compiler]:
        """The compiler, whose making begins with the first call. Little else of the process runs meanwhile."""
        if self._compiler is None:
            self._compiler = self._pool.submit(self._make_compiler)
        return self._compiler

    def start(self, grammar: Grammar, outputs: list[int]) -> Future[Matcher]:
        """Begin to make what follows `grammar` behind the `outputs` of a turn. The future raises `GrammarError`."""
        return self._pool.submit(self._make, self.prepare(), grammar, outputs)

    def _make(self, making: Future[Compiler], grammar: Grammar, outputs: list[int]) -> Matcher:
        try:
            compiler = making.result()
        except ParameterError as error:  # no tokenizer
            raise GrammarError(error.message) from error
        made = Matcher(compiler.compile(grammar), compiler.vocab_size)
        made.follow(outputs)
        if made.error:
            raise GrammarError(made.error)
        return made
