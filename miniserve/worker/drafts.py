"""Prompt lookup: agents repeat what is in their context, so a draft is what followed the last time the same few tokens
came. A step then computes several tokens of a sequence at once, and keeps those that it would have sampled anyway.

The idea is Saxena's (github.com/apoorvumang/prompt-lookup-decoding); transformers and vLLM have it too.
"""

NGRAM = 3
"""Tokens that must have come before in this order."""
LONGEST_PAUSE = 64
"""Tokens without a draft, at most, after drafts that did not hold."""


class Drafter:
    """Drafts of one sequence, from its own tokens. Their length follows what has held: a draft that held to its end
    doubles the next one; one that did not hold at all is followed by a pause, longer each time. With the token before
    it, a first draft fills half of a step's `rows`, a longest one all of them."""

    def __init__(self, rows: int) -> None:
        self._first, self._most = max(rows // 2 - 1, 1), max(rows - 1, 1)
        self._after: dict[tuple[int, ...], int] = {}  # where the token after each n-gram is, the last time that it came
        self._indexed = NGRAM
        self._length = self._first
        self._pause = 0
        self._next_pause = 1

    def draft(self, tokens: list[int], most: int) -> list[int]:
        """How `tokens` may go on, at most `most` tokens; often nothing. They only ever grow from call to call."""
        for at in range(self._indexed, len(tokens)):
            self._after[tuple(tokens[at - NGRAM : at])] = at
        self._indexed = max(len(tokens), NGRAM)
        if self._pause:
            self._pause -= 1
            return []
        at = self._after.get(tuple(tokens[-NGRAM:]), len(tokens))
        return tokens[at : at + min(self._length, most)]

    def observe(self, drafted: int, held: int) -> None:
        """So many tokens of a draft that had any have held."""
        if held:
            self._next_pause = 1
            self._length = min(2 * self._length, self._most) if held == drafted else held + 1
        else:
            self._pause = self._next_pause
            self._next_pause = min(2 * self._next_pause, LONGEST_PAUSE)
            self._length = self._first
