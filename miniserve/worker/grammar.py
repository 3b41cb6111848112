"""Grammars on a worker: compiled beside the step loop, followed token by token, applied to logits."""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Items
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import torch
from llguidance import LLExecutor, LLMatcher
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask_par

from miniserve.sampling_params import Grammar, ParameterError
from miniserve.text.grammar import Compiler, GrammarError, failure

if TYPE_CHECKING:
    from miniserve.worker.sequence import Sequence

THREADS = 2
"""That compile: one grammar that takes long does not hold up all others."""


class Matcher:
    """Where one output stands in its grammar. `error` tells why it cannot go on, a sentence; empty while it can."""

    def __init__(self, matcher: LLMatcher, vocab_size: int) -> None:
        self.matcher = matcher
        self.vocab_size = vocab_size
        self.error = ""
        self._followed = 0

    def follow(self, outputs: Items[int]) -> None:
        """Take in those of all `outputs` that are new. So it goes on after a handoff or a crash from whatever tokens
        there are."""
        fresh = outputs[self._followed :]
        self._followed = len(outputs)
        if not self.error and not self.matcher.consume_tokens(list(fresh)):
            self.error = failure(self.matcher)


class Grammars:
    """Compiles for one worker. `make` is called at once, beside the caller: it may raise `ParameterError`, which then
    is the fate of every grammar."""

    def __init__(self, make: Callable[[], Compiler]) -> None:
        self._pool = ThreadPoolExecutor(THREADS, "grammar")
        self._compiler = self._pool.submit(make)

    def start(self, grammar: Grammar, outputs: list[int]) -> Future[Matcher]:
        """Begin to make what follows `grammar`, from behind the `outputs` that a turn has already. The future raises
        `GrammarError`."""
        return self._pool.submit(self._make, grammar, outputs)

    def _make(self, grammar: Grammar, outputs: list[int]) -> Matcher:
        try:
            compiler = self._compiler.result()
        except ParameterError as error:  # no tokenizer
            raise GrammarError(error.message) from error
        made = Matcher(compiler.compile(grammar), compiler.vocab_size)
        made.follow(outputs)
        if made.error:
            raise GrammarError(made.error)
        return made


class Masks:
    """Keeps the rows of a batch within their grammars."""

    def __init__(self) -> None:
        self._executor = LLExecutor()

    def apply(self, logits: torch.Tensor, sequences: list[Sequence], ends: frozenset[int]) -> None:
        """Rule out what may not come next: minus infinity in `logits` (float32 `[n, vocab]`, changed in place), of
        sequences that have a grammar only. Before `min_tokens` that is an end (of the ids `ends`, and stop tokens) too,
        unless nothing else may come. A grammar that fails lets everything through; its matcher says so."""
        found = [(row, s, s.compiling.result()) for row, s in enumerate(sequences) if s.compiling is not None]
        if not found:
            return
        vocab = logits.shape[1]
        for _, sequence, matcher in found:
            matcher.follow(sequence.outputs)
        size = found[0][2].vocab_size
        bits = allocate_token_bitmask(len(found), size)
        fill_next_token_bitmask_par(self._executor, [(m.matcher, i) for i, (_, _, m) in enumerate(found)], bits)
        pinned = logits.device.type == "cuda"
        ruled_out = torch.empty(len(found), vocab, dtype=torch.bool, pin_memory=pinned)
        allowed = np.unpackbits(bits.view(np.uint8), axis=1, count=vocab, bitorder="little")
        for i, (_, sequence, matcher) in enumerate(found):
            matcher.error = matcher.error or failure(matcher.matcher)
            if sequence.num_outputs < sequence.params.min_tokens:
                _without(allowed[i], [*ends, *sequence.params.stop_token_ids])
            if matcher.error or not allowed[i].any():
                matcher.error = matcher.error or "no token of this model may come next."
                allowed[i] = 1
        np.equal(allowed, 0, out=ruled_out.numpy())
        mask = ruled_out.to(logits.device, non_blocking=True)
        if len(found) == len(sequences):
            logits.masked_fill_(mask, -torch.inf)
            return
        rows = torch.tensor([row for row, _, _ in found], pin_memory=pinned).to(logits.device, non_blocking=True)
        logits.index_copy_(0, rows, logits[rows].masked_fill_(mask, -torch.inf))


def _without(allowed: np.ndarray, tokens: list[int]) -> None:
    """Rule out `tokens` in one row, unless that leaves nothing."""
    rest = allowed.copy()
    rest[tokens] = 0
    if rest.any():
        allowed[:] = rest
