"""What answers to chats and completions have in common: the tokens they used, and log-probabilities."""

import codecs
from collections.abc import Sequence
from typing import Any

from miniserve.api.generation import Choice
from miniserve.cluster.messages import TokenLogprob
from miniserve.text.tokenizer import Tokenizer


def usage(choices: Sequence[Choice], opening: bool = False) -> dict[str, Any]:
    """What one or all choices of a request have used so far; an `opening` has no output yet. A prompt counts once,
    however many choices it has."""
    prompts = choices[:: choices[0].params.n]
    prompt_tokens = sum(choice.prompt_tokens for choice in prompts)
    output_tokens = 0 if opening else sum(choice.output_tokens for choice in choices)
    used: dict[str, Any] = {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": output_tokens,
        "total_tokens": prompt_tokens + output_tokens,
        "prompt_tokens_details": {"cached_tokens": sum(choice.cached_tokens for choice in prompts)},
    }
    if any(choice.thinks for choice in choices):
        used["completion_tokens_details"] = {"reasoning_tokens": sum(choice.reasoning_tokens for choice in choices)}
    return used


Scored = Sequence[tuple[int, TokenLogprob | None]]
LOWEST = -9999.0
"""Stands for minus infinity, which JSON lacks; as in OpenAI's answers and vLLM's."""


def chat_logprobs(tokenizer: Tokenizer, entries: list[TokenLogprob]) -> dict[str, Any]:
    """Log-probabilities as chats have them: each token with its exact bytes and its alternatives."""

    def logprob_of(token: int, logprob: float) -> dict[str, Any]:
        data = tokenizer.token_bytes(token)
        return {"token": data.decode("utf-8", "replace"), "bytes": list(data), "logprob": max(logprob, LOWEST)}

    return {
        "content": [
            {**logprob_of(entry.token, entry.logprob), "top_logprobs": [logprob_of(*top) for top in entry.top]}
            for entry in entries
        ]
    }


def prompt_logprobs(tokenizer: Tokenizer, choice: Choice, count: int) -> list[dict[str, Any] | None]:
    """Those of a prompt as vLLM has them: by token id, with `count` likely ones. The first token has none."""
    found: list[dict[str, Any] | None] = [None]
    for entry in choice.prompt_logprobs:
        ranked = [(rank, *top) for rank, top in enumerate(entry.top[:count], 1)]
        named: dict[str, Any] = {}
        for rank, token, logprob in [*ranked, (entry.rank, entry.token, entry.logprob)]:
            text = tokenizer.token_bytes(token).decode("utf-8", "replace")
            named[str(token)] = {"logprob": max(logprob, LOWEST), "rank": rank, "decoded_token": text}
        found.append(named)
    return found


class CompletionLogprobWriter:
    """Log-probabilities as completions have them, with `count` of the likeliest tokens beside each one. A writer is for
    one choice: it counts the characters of its text."""

    def __init__(self, tokenizer: Tokenizer, count: int, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._count = count
        self._skip = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0

    def write(self, entries: list[TokenLogprob], text: str = "", prompt: Scored = ()) -> dict[str, list[Any]]:
        """The next tokens, first those of the `prompt` if it is echoed as `text`. They stand there as far as they were
        written: no special ones that the tokenizer has added, nor its space before the first word."""
        out: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for number, (token, entry) in enumerate([*prompt, *((entry.token, entry) for entry in entries)], 1):
            out["tokens"].append(self._name(token))
            out["token_logprobs"].append(max(entry.logprob, LOWEST) if entry else None)
            # The token itself is always among the alternatives, even if it is not one of the most likely.
            top = [*entry.top[: self._count], (token, entry.logprob)] if entry else []
            out["top_logprobs"].append({self._name(t): max(value, LOWEST) for t, value in top} or None)
            out["text_offset"].append(self._offset)
            piece = self._decoder.decode(self._tokenizer.token_bytes(token))
            if number > len(prompt):
                self._offset += 0 if token in self._skip else len(piece)
                continue
            if not text.startswith(piece, self._offset):
                piece = "" if token in self._tokenizer.special_ids else piece.lstrip(" ")
            self._offset = min(self._offset + len(piece), len(text)) if number < len(prompt) else len(text)
        return out

    def _name(self, token: int) -> str:
        """The token's text, or its bytes if it is a part of a character, since names must differ."""
        data = self._tokenizer.token_bytes(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
