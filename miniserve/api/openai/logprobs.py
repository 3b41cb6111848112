"""Log-probabilities in the two shapes of the OpenAI API."""

from __future__ import annotations

import codecs

from miniserve.api.openai.answers import ChatLogprobs, CompletionLogprobs, TopLogprob
from miniserve.cluster.messages import TokenLogprob
from miniserve.text.tokenizer import Tokenizer

LOWEST = -9999.0
"""Stands for minus infinity, which JSON lacks; as in OpenAI's answers and vLLM's."""


def chat_logprobs(tokenizer: Tokenizer, entries: list[TokenLogprob]) -> ChatLogprobs:
    """The chat shape: each token with its exact bytes and its alternatives."""

    def told(token: int, logprob: float) -> TopLogprob:
        data = tokenizer.token_bytes(token)
        return {"token": data.decode("utf-8", "replace"), "bytes": list(data), "logprob": max(logprob, LOWEST)}

    return {
        "content": [
            {**told(entry.token, entry.logprob), "top_logprobs": [told(*top) for top in entry.top]} for entry in entries
        ]
    }


class CompletionLogprobWriter:
    """The completions shape, for one choice: it knows how many characters of text came before."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0

    def write(self, entries: list[TokenLogprob]) -> CompletionLogprobs:
        """For the next tokens of the choice."""
        out: CompletionLogprobs = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for entry in entries:
            logprob = max(entry.logprob, LOWEST)
            name = self._name(entry.token)
            out["tokens"].append(name)
            out["token_logprobs"].append(logprob)
            # The sampled token is always among them, even if it is not one of the most likely.
            tops = {self._name(token): max(value, LOWEST) for token, value in entry.top}
            out["top_logprobs"].append(tops | {name: logprob})
            out["text_offset"].append(self._offset)
            if entry.token not in self._skip:
                self._offset += len(self._decoder.decode(self._tokenizer.token_bytes(entry.token)))
        return out

    def _name(self, token: int) -> str:
        """The token's text; where it is a part of a character its bytes, since names must differ."""
        data = self._tokenizer.token_bytes(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
