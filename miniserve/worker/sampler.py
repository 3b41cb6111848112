"""From logits to tokens. Stateless: what is drawn depends on the request's seed and the output's position only.

So the same request gives the same text whatever shares its batch, after a preemption, and on another worker.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from itertools import repeat

import torch

from miniserve.cluster.messages import TokenLogprob
from miniserve.ops import Ops
from miniserve.sampling_params import SamplingParams
from miniserve.worker.masks import Masks
from miniserve.worker.sequence import Sequence
from miniserve.worker.step import Sampled


def uniform(seed: int, position: int) -> float:
    """The number in [0, 1) that draws output number `position` of a request."""
    digest = blake2b(f"{seed}:{position}".encode(), digest_size=8).digest()
    return (int.from_bytes(digest, "little") >> 11) / 2**53


SCORED_LOGITS = 2**23
"""Logits that are made at once to score a prompt: 32 MiB. Those of a whole step would take gigabytes."""


@dataclass(frozen=True)
class LogprobRows:
    """What the API reports of the tokens in some `rows`; `counts` says how many of the likeliest ones are wanted.
    `found` are of each row the token's own log-probability and rank from 1, then the likeliest ids and theirs."""

    rows: list[int]
    counts: list[int]
    found: list[torch.Tensor]

    @classmethod
    def of(cls, logprobs: torch.Tensor, tokens: torch.Tensor, rows: list[int], counts: list[int]) -> LogprobRows:
        """From `logprobs` `[len(rows), vocab]` and the `tokens` of these rows."""
        own = logprobs.gather(1, tokens.unsqueeze(1))
        top, ids = logprobs.topk(max(counts))
        return cls(rows, counts, [own.squeeze(1), (logprobs > own).sum(-1) + 1, ids, top])


@dataclass(frozen=True)
class Samples:
    """Sampled or scored `tokens`, int64 `[n]`, and what is reported of some. The device may still be at work."""

    tokens: torch.Tensor
    logprobs: LogprobRows | None = None

    def to_host(self) -> Samples:
        """The same in pinned memory, where it will be as soon as the device has done all that it was given."""
        rows = self.logprobs
        if rows is not None:
            rows = replace(rows, found=[pinned(x) for x in rows.found])
        return Samples(pinned(self.tokens), rows)

    def read(self) -> Sampled:
        """Wait for them: one token for each row, with its log-probability where the request asks for it."""
        tokens = self.tokens.tolist()
        found: list[TokenLogprob | None] = [None] * len(tokens)
        if wanted := self.logprobs:
            own, rank, ids, top = (x.tolist() for x in wanted.found)
            for i, (row, count) in enumerate(zip(wanted.rows, wanted.counts, strict=True)):
                best = list(zip(ids[i][:count], top[i][:count], strict=True))
                found[row] = TokenLogprob(tokens[row], own[i], rank[i], best)
        return list(zip(tokens, found, strict=True))


@dataclass
class Sampler:
    """Chooses the next token of each sequence, on the device and without waiting for it. `eos` are the ids that end a
    turn; `ops` keeps the candidates of a filter."""

    eos: frozenset[int]
    ops: Ops
    masks: Masks = field(default_factory=Masks)

    @torch.inference_mode()
    def sample(self, logits: torch.Tensor, sequences: list[Sequence], ahead: list[int] | None = None) -> Samples:
        """One token for each row of `logits` (float32 `[n, vocab]`, changed in place): the next one of
        `sequences[row]`, or with `ahead` the one that comes so many after it."""
        numbers = [s.num_outputs + s.sampling + more for s, more in zip(sequences, ahead or repeat(0), strict=False)]
        reported = [row for row, sequence in enumerate(sequences) if sequence.params.logprobs is not None]
        raw = _rows(logits, reported).log_softmax(-1) if reported else None
        for row, sequence in enumerate(sequences):
            self._shape(logits[row], sequence, numbers[row])
        self.masks.apply(logits, sequences, self.eos)
        tokens = logits.argmax(-1)
        drawn = [row for row, sequence in enumerate(sequences) if not sequence.params.greedy]
        if drawn:
            points = [uniform(sequences[row].seed, numbers[row]) for row in drawn]
            picked = self._draw(_rows(logits, drawn), [sequences[row].params for row in drawn], points)
            tokens = picked if len(drawn) == len(sequences) else tokens.index_copy(0, put(drawn, logits.device), picked)
        if raw is None:
            return Samples(tokens)
        counts = [sequences[row].params.logprobs or 0 for row in reported]
        return Samples(tokens, LogprobRows.of(raw, _rows(tokens, reported), reported, counts))

    def _shape(self, row: torch.Tensor, sequence: Sequence, number: int) -> None:
        """Apply what a request wants changed in the logits of output `number`: bias, penalties, no end before
        min_tokens."""
        params = sequence.params
        if params.repetition_penalty != 1.0:
            seen = put(sorted(set(sequence.tokens)), row.device)
            values = row[seen]
            # CTRL (arXiv 1909.05858), as transformers and vLLM do it: away from zero is always less likely.
            penalty = params.repetition_penalty
            row[seen] = torch.where(values > 0, values / penalty, values * penalty)
        if (params.presence_penalty or params.frequency_penalty) and (outputs := sequence.outputs):
            often = Counter(outputs)
            counts = put(list(often.values()), row.device)
            row[put(list(often), row.device)] -= params.frequency_penalty * counts + params.presence_penalty
        if params.logit_bias:
            bias = params.logit_bias
            row[put(list(bias), row.device)] += put(list(bias.values()), row.device, torch.float32)
        if number < params.min_tokens and params.grammar is None:
            ends = [*params.stop_token_ids, *(() if params.ignore_eos else self.eos)]
            row[put(ends, row.device)] = -torch.inf

    def _draw(self, logits: torch.Tensor, params: list[SamplingParams], points: list[float]) -> torch.Tensor:
        """Draw one id a row by inverting the cumulative distribution at the request's own random number (`points`)."""

        def column(values: list[float], dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return put(values, logits.device, dtype).unsqueeze(1)

        temperature = column([p.temperature for p in params])
        at = column(points, torch.float64)
        probs = ((logits - logits.amax(-1, keepdim=True)) / temperature).softmax(-1)
        if all(p.top_k <= 0 and p.top_p >= 1 and p.min_p <= 0 for p in params):
            return _invert(probs, at).squeeze(1)
        top_k = column([p.top_k if 0 < p.top_k < probs.shape[1] else probs.shape[1] for p in params], torch.int32)
        top_p, min_p = column([p.top_p for p in params]), column([p.min_p for p in params])
        ids, kept = self.ops.filter(probs, top_k, top_p, min_p)
        picked = _invert(kept, at)
        return (picked if ids is None else ids.gather(1, picked)).squeeze(1)


def score(logits: torch.Tensor, tokens: list[int], counts: list[int]) -> Samples:
    """Given `tokens`, one for each row of `logits` (float32 `[n, vocab]`), with `counts` of the likeliest ones."""
    given = put(tokens, logits.device)
    return Samples(given, LogprobRows.of(logits.log_softmax(-1), given, [*range(len(tokens))], counts))


def put(values: list[int] | list[float], device: torch.device, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    """`values` on the device, without waiting for it: through pinned memory, which torch does not use again before the
    copy has been made."""
    return torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda").to(device, non_blocking=True)


def pinned(x: torch.Tensor) -> torch.Tensor:
    """A copy of `x` that will be in pinned host memory when the device has come so far."""
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)


def _rows(x: torch.Tensor, rows: list[int]) -> torch.Tensor:
    return x if len(rows) == x.shape[0] else x[put(rows, x.device)]


def _invert(weights: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Index of the first weight at which the running sum passes `points` (0 to 1) of the total, `[n, 1]`."""
    sums = weights.double().cumsum(-1)
    index = torch.searchsorted(sums, points * sums[:, -1:], right=True)
    # Rounding may land past the last weight that is not zero.
    last = (weights > 0).int().cumsum(-1).argmax(-1, keepdim=True)
    return torch.minimum(index, last)
