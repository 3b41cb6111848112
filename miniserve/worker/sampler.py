"""From logits to tokens: what is drawn depends on the request's seed and the output's position only.

So the same request gives the same text whatever shares its batch, after a preemption, and on another worker.
"""

from dataclasses import dataclass, field, replace
from hashlib import blake2b
from itertools import accumulate, chain, repeat
from typing import Self
from weakref import WeakKeyDictionary

import numpy as np
import torch
from llguidance import LLExecutor
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask_par

from miniserve.cluster.messages import TokenLogprob
from miniserve.ops import Ops
from miniserve.sampling_params import SamplingParams
from miniserve.text.grammar import failure
from miniserve.worker.sequence import Sequence
from miniserve.worker.step import Sampled


def uniform(seed: int, position: int) -> float:
    """The number in [0, 1) that draws output number `position` of a request."""
    digest = blake2b(f"{seed}:{position}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / 2**53


SCORED_LOGITS = 2**23
"""Logits that are made at once to score a prompt: 32 MiB. Those of a whole step would take gigabytes."""


@dataclass(frozen=True)
class Samples:
    """Sampled or scored `tokens`, int64 `[n]`, and what the API reports of those in some `rows`: `counts` says how many
    of the likeliest ones are wanted, `found` are of each row the token's own log-probability and rank from 1, then the
    likeliest ids and theirs. The device may still be at work."""

    tokens: torch.Tensor
    rows: list[int] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    found: list[torch.Tensor] = field(default_factory=list)

    @classmethod
    def of(cls, tokens: torch.Tensor, logprobs: torch.Tensor, rows: list[int], counts: list[int]) -> Self:
        """With the `logprobs` `[len(rows), vocab]` of these rows."""
        own = logprobs.gather(1, _rows(tokens, rows).unsqueeze(1))
        top, ids = logprobs.topk(max(counts))
        return cls(tokens, rows, counts, [own.squeeze(1), (logprobs > own).sum(-1) + 1, ids, top])

    def to_host(self) -> Self:
        """The same in pinned memory, where it will be as soon as the device has done all that it was given."""
        return replace(self, tokens=pinned(self.tokens), found=[pinned(x) for x in self.found])

    def read(self) -> Sampled:
        """Wait for them: one token for each row, with its log-probability where the request asks for it."""
        tokens = self.tokens.tolist()
        logprobs: list[TokenLogprob | None] = [None] * len(tokens)
        if self.rows:
            found = zip(self.rows, self.counts, *(x.tolist() for x in self.found), strict=True)
            for row, count, own, rank, ids, top in found:
                best = list(zip(ids[:count], top[:count], strict=True))
                logprobs[row] = TokenLogprob(tokens[row], own, rank, best)
        return list(zip(tokens, logprobs, strict=True))


TAIL = 64
"""So many tokens of a sequence are sent to its device anew in each step, at most; those before them are there."""


@dataclass
class Penalties:
    """Makes tokens that a sequence has, or has said, less likely. The first tokens of each sequence stay on the device
    as long as there is the sequence, 4 bytes each: so a step's work on the host does not grow with them."""

    _kept: WeakKeyDictionary[Sequence, torch.Tensor] = field(default_factory=WeakKeyDictionary)

    def apply(self, logits: torch.Tensor, rows: dict[int, Sequence], latest: torch.Tensor) -> None:
        """Change these rows of `logits` `[n, vocab]`. A token that a sequence has more than once is computed so many
        times, to the same number. `latest` are the tokens that are still being sampled, in this order."""
        device, vocab, found = logits.device, logits.shape[1], list(rows.values())
        kept = [self._keep(sequence, device) for sequence in found]
        rest = [s.tokens[len(ids) :] + [0] * s.sampling for s, ids in zip(found, kept, strict=True)]
        new, ends = put([*chain(*rest)], device, torch.int32), accumulate(map(len, rest))
        if fed := [end - 1 for s, end in zip(found, ends, strict=True) if s.sampling]:
            new.index_copy_(0, put(fed, device), latest.int())
        ids = torch.cat([*chain(*zip(kept, new.split([*map(len, rest)]), strict=True))])
        # Two runs of each sequence: what came before its outputs, and these.
        lengths = [n for s in found for n in (s.given - s.prior, s.num_outputs + s.sampling)]
        of = torch.repeat_interleave(put(lengths, device), output_size=len(ids))
        at = ids + put([row * vocab for row in rows for _ in range(2)], device).index_select(0, of)
        params = [(p.repetition_penalty, p.presence_penalty, p.frequency_penalty) for p in (s.params for s in found)]
        numbers = put([n for p in params for said in (0.0, 1.0) for n in (said, *p)], device, torch.float32)
        said, repetition, presence, frequency = numbers.view(-1, 4).index_select(0, of).unbind(1)
        flat = logits.view(-1)
        values = flat.index_select(0, at)
        # CTRL (arXiv 1909.05858), as transformers and vLLM do it: away from zero is always less likely.
        values = torch.where(values > 0, values / repetition, values * repetition)
        if any(other for p in params for other in p[1:]):
            often = torch.zeros_like(flat).index_add_(0, at, said).index_select(0, at)
            values -= torch.where(often > 0, frequency * often + presence, 0.0)
        flat.index_copy_(0, at, values)

    def _keep(self, sequence: Sequence, device: torch.device) -> torch.Tensor:
        """Its first tokens, int32: all that there were at the first time, and later all but fewer than `TAIL`."""
        kept = self._kept.get(sequence, torch.empty(0, dtype=torch.int32, device=device))
        if not len(kept) or len(sequence.tokens) - len(kept) >= TAIL:
            new = put(sequence.tokens[len(kept) :], device, torch.int32)
            self._kept[sequence] = kept = torch.cat((kept, new))
        return kept


@dataclass
class Sampler:
    """Chooses the next token of each sequence, on the device and without waiting for it. `eos` are the ids that end a
    turn; `ops` keeps the candidates of a filter."""

    eos: frozenset[int]
    ops: Ops
    _rows: dict[Sequence, int] = field(default_factory=dict)
    _tokens: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    _penalties: Penalties = field(default_factory=Penalties)
    _executor: LLExecutor = field(default_factory=LLExecutor)

    @torch.inference_mode()
    def sample(self, logits: torch.Tensor, sequences: list[Sequence], ahead: list[int] | None = None) -> Samples:
        """One token for each row of `logits` (float32 `[n, vocab]`, changed in place): the next one of
        `sequences[row]`, or with `ahead` the one that comes so many after it."""
        numbers = [s.num_outputs + s.sampling + more for s, more in zip(sequences, ahead or repeat(0), strict=False)]
        reported = [row for row, sequence in enumerate(sequences) if sequence.params.logprobs is not None]
        raw = _rows(logits, reported).log_softmax(-1) if reported else None
        if penalized := {row: sequence for row, sequence in enumerate(sequences) if sequence.params.penalized}:
            self._penalties.apply(logits, penalized, self.latest([s for s in penalized.values() if s.sampling]))
        for row, sequence in enumerate(sequences):
            self._shape(logits[row], sequence, numbers[row])
        self._follow_grammars(logits, sequences)
        tokens = logits.argmax(-1)
        for filtered in (False, True):  # apart, since a filter draws in another order
            drawn = [i for i, s in enumerate(sequences) if not s.params.greedy and s.params.filtered is filtered]
            if drawn:
                points = [uniform(sequences[row].seed, numbers[row]) for row in drawn]
                picked = self._draw(_rows(logits, drawn), [sequences[row].params for row in drawn], points)
                whole = len(drawn) == len(sequences)
                tokens = picked if whole else tokens.index_copy(0, put(drawn, logits.device), picked)
        self._rows, self._tokens = {sequence: row for row, sequence in enumerate(sequences)}, tokens
        if raw is None:
            return Samples(tokens)
        counts = [sequences[row].params.logprobs or 0 for row in reported]
        return Samples.of(tokens, raw, reported, counts)

    def latest(self, sequences: list[Sequence]) -> torch.Tensor:
        """The tokens sampled last for some sequences, int64, on the device: the host may not know them yet."""
        return self._tokens[put([self._rows[sequence] for sequence in sequences], self._tokens.device)]

    def _shape(self, row: torch.Tensor, sequence: Sequence, number: int) -> None:
        """Apply what a request wants changed in the logits of output `number`: bias, no end before min_tokens."""
        params = sequence.params
        if params.logit_bias:
            bias = params.logit_bias
            row[put(list(bias), row.device)] += put(list(bias.values()), row.device, torch.float32)
        if number < params.min_tokens and params.grammar is None:
            ends = [*params.stop_token_ids, *(() if params.ignore_eos else self.eos)]
            row[put(ends, row.device)] = -torch.inf

    def _follow_grammars(self, logits: torch.Tensor, sequences: list[Sequence]) -> None:
        """Rule out in the rows of sequences that have a grammar what may not come next. Before `min_tokens` that is an
        end (`eos` and stop tokens) too, unless nothing else may come. A grammar that fails lets everything through; its
        matcher says so."""
        found = [(row, s, s.matcher) for row, s in enumerate(sequences) if s.matcher is not None]
        if not found:
            return
        vocab = logits.shape[1]
        for _, sequence, matcher in found:
            matcher.follow(sequence.outputs)
        bits = allocate_token_bitmask(len(found), found[0][2].vocab_size)
        fill_next_token_bitmask_par(self._executor, [(m.matcher, i) for i, (_, _, m) in enumerate(found)], bits)
        ruled_out = torch.empty(len(found), vocab, dtype=torch.bool, pin_memory=logits.device.type == "cuda")
        allowed = np.unpackbits(bits.view(np.uint8), axis=1, count=vocab, bitorder="little")
        for i, (_, sequence, matcher) in enumerate(found):
            matcher.error = matcher.error or failure(matcher.matcher)
            if sequence.num_outputs < sequence.params.min_tokens:
                rest = allowed[i].copy()
                rest[[*self.eos, *sequence.params.stop_token_ids]] = 0
                allowed[i] = rest if rest.any() else allowed[i]
            if matcher.error or not allowed[i].any():
                matcher.error = matcher.error or "no token of this model may come next."
                allowed[i] = 1
        np.equal(allowed, 0, out=ruled_out.numpy())
        mask = ruled_out.to(logits.device, non_blocking=True)
        if len(found) == len(sequences):
            logits.masked_fill_(mask, -torch.inf)
        else:
            rows = put([row for row, _, _ in found], logits.device)
            logits.index_copy_(0, rows, logits[rows].masked_fill_(mask, -torch.inf))

    def _draw(self, logits: torch.Tensor, params: list[SamplingParams], points: list[float]) -> torch.Tensor:
        """Draw one id a row by inverting the cumulative distribution at its own point; all are filtered, or none is."""

        def column(values: list[float], dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return put(values, logits.device, dtype).unsqueeze(1)

        temperature, at = column([p.temperature for p in params]), column(points, torch.float64)
        if not params[0].filtered:
            return self.ops.draw(logits, temperature, at).squeeze(1)
        probs = ((logits - logits.amax(-1, keepdim=True)) / temperature).softmax(-1)
        top_k = column([p.top_k if 0 < p.top_k < probs.shape[1] else probs.shape[1] for p in params], torch.int32)
        top_p, min_p = column([p.top_p for p in params]), column([p.min_p for p in params])
        ids, kept = self.ops.filter(probs, top_k, top_p, min_p)
        picked = self.ops.draw(kept, None, at)
        return (picked if ids is None else ids.gather(1, picked)).squeeze(1)


def score(logits: torch.Tensor, tokens: list[int], counts: list[int]) -> Samples:
    """Given `tokens`, one for each row of `logits` (float32 `[n, vocab]`), with `counts` of the likeliest ones."""
    given = put(tokens, logits.device)
    return Samples.of(given, logits.log_softmax(-1), [*range(len(tokens))], counts)


def put(values: list[int] | list[float], device: torch.device, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    """`values` on the device, without waiting for it: through pinned memory, which torch does not use again before the
    copy has been made."""
    return torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda").to(device, non_blocking=True)


def pinned(x: torch.Tensor) -> torch.Tensor:
    """A copy of `x` that will be in pinned host memory when the device has come so far."""
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)


def _rows(x: torch.Tensor, rows: list[int]) -> torch.Tensor:
    return x if len(rows) == x.shape[0] else x[put(rows, x.device)]
