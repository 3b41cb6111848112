"""Text that grows token by token: whole characters only, and never a part of a stop string."""

import codecs
from collections.abc import Iterable, Sequence
from typing import Literal

from miniserve.cluster.messages import Ended, FirstToken, Tokens
from miniserve.sampling_params import SamplingParams
from miniserve.text.tokenizer import Tokenizer


def beginning(text: str, marks: Sequence[str]) -> int:
    """How many characters at the end of `text` may be the beginning of one of `marks`, which goes on."""
    most = min(len(text), max(map(len, marks)) - 1)
    ends = ((n, text[-n:]) for n in range(most, 0, -1))
    return next((n for n, end in ends if any(len(mark) > n and mark.startswith(end) for mark in marks)), 0)


class IncrementalDetokenizer:
    """Turns the tokens of one turn into text that can be given out at once, as the turn's parameters want it.

    Held back are the bytes of an unfinished character and text that may still be the beginning of a stop string. Of
    several stop strings the one that ends first wins, and of those the longest; how the text is cut into tokens and
    pushes makes no difference. One that ends within the first `min_tokens` tokens does not count. Text is the plain
    concatenation of the tokens' bytes: a sentencepiece model's first token keeps its leading space. `visible` are
    special tokens that are not skipped: the marks of tool calls, which a `Reader` needs to see.

    `finish` is None while the turn goes on; `stop_reason` is the stop string or the token of `stop_token_ids` that
    ended it. `tokens_used` is the number of tokens up to the one that completed a stop string (all so far, if none).
    """

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams, visible: frozenset[int] = frozenset()) -> None:
        self.finish: Literal["stop", "length"] | None = None
        self.stop_reason: str | int | None = None
        self.tokens_used = 0
        self._params = params
        self._token_bytes = tokenizer.token_bytes
        self._skip = tokenizer.special_ids - visible if params.skip_special_tokens else frozenset()
        self._stops = [*params.stop]
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""

    def feed(self, output: FirstToken | Tokens | Ended) -> tuple[str, int]:
        """Take the next tokens: the text that can be given out now, and how many tokens count (up to a stop string)."""
        before = self.tokens_used
        # The token that ends a turn is no part of its text, special or not.
        ended = output if isinstance(output, Ended) else None
        hidden = ended is not None and ended.stop_token is not None and not self._params.include_stop_str_in_output
        text = self.push(output.tokens[:-1] if hidden else output.tokens)
        if self.finish is not None:
            return text, self.tokens_used - before
        if ended is not None and ended.finish != "abort":
            text += self.flush()
            self.finish = self.finish or ended.finish
            if ended.stop_token in self._params.stop_token_ids:
                self.stop_reason = ended.stop_token
        return text, len(output.tokens)

    def push(self, token_ids: Iterable[int]) -> str:
        """Take the next tokens; the text that is now safe to give out. Empty after a stop string."""
        out = []
        for token in token_ids:
            if self.finish is not None:
                break
            self.tokens_used += 1
            if token not in self._skip and (text := self._decoder.decode(self._token_bytes(token))):
                out.append(self._cut_at_stop(text))
        return "".join(out)

    def flush(self) -> str:
        """The rest at the end of a turn; an unfinished character becomes U+FFFD. Empty after a stop string."""
        if self.finish is not None:
            return ""
        text = self._cut_at_stop(self._decoder.decode(b"", final=True))
        rest, self._held = self._held, ""
        return text + rest

    def _cut_at_stop(self, text: str) -> str:
        """What is safe to give out now that `text` has come: all up to a stop string, or to what may become one."""
        if not self._stops:
            return text
        seen, text = len(self._held), self._held + text
        if self.tokens_used > self._params.min_tokens:
            places = ((stop, text.find(stop, max(seen - len(stop) + 1, 0))) for stop in self._stops)
            ends = [(at + len(stop), -len(stop), stop) for stop, at in places if at >= 0]
            if ends:
                end, back, stop = min(ends)
                self._held = ""
                self.finish, self.stop_reason = "stop", stop
                return text[: end if self._params.include_stop_str_in_output else end + back]
        safe = len(text) - beginning(text, self._stops)
        self._held = text[safe:]
        return text[:safe]
