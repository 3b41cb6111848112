"""What is measured while serving: averages, quantiles, and how fast a worker computes. No profile run comes first.

Pure: times come in as arguments, in seconds.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from miniserve.cluster.messages import StepTime

if TYPE_CHECKING:
    import numpy as np

CELL_MEMORY = 16
"""Measurements after which a cell's mean forgets the oldest ones: minutes of a drifting machine, not one hiccup."""
REFIT = 64
"""Measurements between two fits, once the first ones are in."""
FADE = 500
"""Measurements in other cells after which a cell that got none counts half: it still holds what only it has seen."""
GUESS_TOKEN, GUESS_STEP = 1e-3, 20e-3
"""Seconds of a prompt's token and of a decode step before anything was measured. Any will do: they are gone soon."""


@dataclass
class Average:
    """A running mean that forgets: the last `memory` values count."""

    memory: int = 16
    count: int = 0
    value: float = 0.0

    def add(self, value: float) -> None:
        self.count += 1
        self.value += (value - self.value) / min(self.count, self.memory)


@dataclass
class TimeAverage:
    """The mean of a quantity over time until `at`, the last `window` seconds counting most."""

    window: float
    at: float = 0.0
    value: float = 0.0

    def update(self, value: float, now: float) -> None:
        """The quantity has been `value` since the last update."""
        kept = math.exp(-max(now - self.at, 0.0) / self.window)
        self.value = self.value * kept + value * (1 - kept)
        self.at = now


def quantile(values: Iterable[float], q: float, default: float) -> float:
    """The nearest-rank quantile: what a share `q` of them does not exceed; `default` without any."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))] if ordered else default


def non_negative_fit(rows: "np.ndarray", counts: "np.ndarray", ridge: float) -> "np.ndarray":
    """The least squares of `rows @ x = 1` with no x below zero: features with a weight below zero are left out, the
    lowest first. A row counts `counts` times; a `ridge` on all but the first feature decides what is left open."""
    import numpy as np  # Not at the top: `miniserve --help` names the policies, and should not wait for numpy.

    scale = np.maximum(rows.mean(axis=0), 1e-12)
    rows = rows / scale
    a = rows.T @ (counts[:, None] * rows) + np.diag([1e-6] + [ridge] * (rows.shape[1] - 1))
    b = rows.T @ counts
    weights, used = np.zeros(len(b)), list(range(len(b)))
    while used:
        solved = np.linalg.solve(a[np.ix_(used, used)], b[used])
        if solved.min() >= 0:
            weights[used] = solved
            break
        del used[solved.argmin()]
    return weights / scale


class Plane:
    """`seconds = w . x` from measurements of (x, seconds), with three features and no w below zero.

    Measurements are kept as running means of cells, one for each power of two of what was computed: what was seen of
    other sizes is not forgotten while a worker does the same for an hour. The fit is least squares of the relative
    error over cells; a small ridge, larger for the later features, decides what the cells leave open.
    """

    def __init__(self) -> None:
        self._cells: dict[tuple[int, ...], list[float]] = {}
        """Key -> count, number of the last measurement, mean seconds, mean of each feature."""
        self._weights = [0.0] * 3
        self.count = 0
        """Of measurements."""

    def add(self, a: float, b: float, c: float, seconds: float) -> None:
        key = int(a + 1).bit_length(), int(b + 1).bit_length(), int(c + 1).bit_length()
        cell = self._cells.get(key) or self._cells.setdefault(key, [0.0] * 6)
        self.count += 1
        count = min(cell[0] + 1, CELL_MEMORY)
        if count > 4:
            seconds = min(seconds, 4 * cell[2])  # a hiccup of the machine
        _, _, mean, x, y, z = cell
        means = mean + (seconds - mean) / count, x + (a - x) / count, y + (b - y) / count, z + (c - z) / count
        cell[:] = count, self.count, *means
        if self.count % REFIT == 0 or (self.count < REFIT and self.count & (self.count - 1) == 0):
            self._fit()

    def at(self, a: float, b: float, c: float) -> float:
        wa, wb, wc = self._weights
        return wa * a + wb * b + wc * c

    def _fit(self) -> None:
        import numpy as np

        cells = np.array([cell for cell in self._cells.values() if cell[2] > 0])
        if not len(cells):
            return
        counts = cells[:, 0] / (1 + (self.count - cells[:, 1]) / FADE)
        self._weights = non_negative_fit(cells[:, 3:] / cells[:, 2:3], counts, 1e-2).tolist()


class Speed:
    """How long a worker takes, from its own steps; from those of all workers (`fleet`) until it has made some.

    The shapes are those of a transformer: a decode step is a constant (the weights are read), a part for each sequence
    and one for each token of KV that is read; a prefill is a part for each token, one for each pair of a token and one
    that it looks back on, and a constant for each step.
    """

    def __init__(self, fleet: "Speed | None" = None) -> None:
        self._fleet = fleet
        self.decodes = Plane()
        self.prefills = Plane()
        self._chunk = 1

    def observe(self, step: StepTime) -> None:
        if self._fleet is not None:
            self._fleet.observe(step)
        if not step.prefill:
            self.decodes.add(1.0, step.decodes, step.decode_context, step.seconds)
            return
        self._chunk = max(self._chunk, step.prefill)
        beside = max(self.decode(step.decodes, step.decode_context) - self.decode(0, 0), 0.0) if step.decodes else 0.0
        seconds = max(step.seconds - beside, 0.1 * step.seconds)
        self.prefills.add(step.prefill, step.prefill_context, 1.0, seconds)

    def prefill(self, tokens: int, context: int = 0) -> float:
        """Seconds to compute `tokens` of a prompt after `context` others, with nothing beside it."""
        if tokens <= 0:
            return 0.0
        if not self.prefills.count:
            return self._fleet.prefill(tokens, context) if self._fleet else tokens * GUESS_TOKEN
        pairs = tokens * context + tokens * tokens / 2
        return self.prefills.at(tokens, pairs, math.ceil(tokens / self._chunk))

    def held_up(self, tokens: int, context: int = 0) -> float:
        """By how many seconds such a prefill delays each stream beside it, whose steps are longer with it."""
        steps = math.ceil(tokens / self._chunk) if self.prefills.count else 1
        return max(self.prefill(tokens, context) - steps * self.decode(0, 0), 0.0)

    def decode(self, batch: int, context: int) -> float:
        """Seconds of a step that decodes `batch` sequences with `context` tokens in all."""
        if not self.decodes.count:
            return self._fleet.decode(batch, context) if self._fleet else GUESS_STEP
        return self.decodes.at(1.0, batch, context)
