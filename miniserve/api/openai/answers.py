"""The answers to chats, completions and questions about models and tokens, as types: mypy checks the code that builds
them, and OpenAPI documents them.

Shapes and names are OpenAI's; `stop_reason`, `max_model_len`, token ids and everything about tokenizing are vLLM's.
"""

import codecs
from collections.abc import Sequence
from typing import Literal, NotRequired

from typing_extensions import TypedDict

from miniserve.api.generation import Choice, Finish, Generation
from miniserve.cluster.messages import TokenLogprob
from miniserve.text.tokenizer import Tokenizer


class PromptTokensDetails(TypedDict):
    cached_tokens: int


class CompletionTokensDetails(TypedDict):
    reasoning_tokens: int


class Usage(TypedDict):
    """Only models that reason have details of the completion."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: NotRequired[CompletionTokensDetails]


class TopLogprob(TypedDict):
    token: str
    bytes: list[int]
    logprob: float


class TokenLogprobs(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(TypedDict):
    content: list[TokenLogprobs]


class CalledFunction(TypedDict):
    """`arguments` is the JSON text of an object."""

    name: str
    arguments: str


class ToolCallOut(TypedDict):
    id: str
    type: Literal["function"]
    function: CalledFunction


class ChatMessageOut(TypedDict):
    """`content` is null where there are only calls or only reasoning, which has two names."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning: NotRequired[str]
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[list[ToolCallOut]]


class ChatChoice(TypedDict):
    index: int
    message: ChatMessageOut
    logprobs: ChatLogprobs | None
    finish_reason: Finish | None
    stop_reason: str | int | None
    token_ids: NotRequired[list[int]]


class PromptLogprob(TypedDict):
    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]


class Answer(TypedDict):
    id: str
    created: int
    model: str
    usage: Usage
    system_fingerprint: str


class ChatCompletion(Answer):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    prompt_token_ids: NotRequired[list[int]]
    prompt_logprobs: NotRequired[PromptLogprobs]


class CompletionLogprobs(TypedDict):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(TypedDict):
    """A choice, or in a stream a piece of it; only its first chunk has the prompt's ids."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Finish | None
    stop_reason: str | int | None
    prompt_token_ids: NotRequired[list[int] | None]
    prompt_logprobs: NotRequired[PromptLogprobs]
    token_ids: NotRequired[list[int]]


class Completion(Answer):
    object: Literal["text_completion"]
    choices: list[CompletionChoice]


class Model(TypedDict):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    max_model_len: int
    vocab_size: int


class ModelList(TypedDict):
    object: Literal["list"]
    data: list[Model]


class Tokenized(TypedDict):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Detokenized(TypedDict):
    prompt: str


class HealthStatus(TypedDict):
    status: Literal["ok"]


class Version(TypedDict):
    version: str


def usage(of: Choice | Generation, output_tokens: int) -> Usage:
    """What a choice or all of a generation has used so far, with `output_tokens`."""
    used: Usage = {
        "prompt_tokens": of.prompt_tokens,
        "completion_tokens": output_tokens,
        "total_tokens": of.prompt_tokens + output_tokens,
        "prompt_tokens_details": {"cached_tokens": of.cached_tokens},
    }
    if of.thinks:
        used["completion_tokens_details"] = {"reasoning_tokens": of.reasoning_tokens}
    return used


Scored = Sequence[tuple[int, TokenLogprob | None]]
LOWEST = -9999.0
"""Stands for minus infinity, which JSON lacks; as in OpenAI's answers and vLLM's."""


def chat_logprobs(tokenizer: Tokenizer, entries: list[TokenLogprob]) -> ChatLogprobs:
    """Log-probabilities as chats have them: each token with its exact bytes and its alternatives."""

    def logprob_of(token: int, logprob: float) -> TopLogprob:
        data = tokenizer.token_bytes(token)
        return {"token": data.decode("utf-8", "replace"), "bytes": list(data), "logprob": max(logprob, LOWEST)}

    return {
        "content": [
            {**logprob_of(entry.token, entry.logprob), "top_logprobs": [logprob_of(*top) for top in entry.top]}
            for entry in entries
        ]
    }


def prompt_logprobs(tokenizer: Tokenizer, choice: Choice, count: int) -> PromptLogprobs:
    """Those of a prompt as vLLM has them: by token id, with `count` likely ones. The first token has none."""
    found: PromptLogprobs = [None]
    for entry in choice.prompt_logprobs:
        ranked = [(rank, *top) for rank, top in enumerate(entry.top[:count], 1)]
        named: dict[str, PromptLogprob] = {}
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

    def write(self, entries: list[TokenLogprob], text: str = "", prompt: Scored = ()) -> CompletionLogprobs:
        """The next tokens, first those of the `prompt` if it is echoed as `text`. They stand there as far as they were
        written: no special ones that the tokenizer has added, nor its space before the first word."""
        out: CompletionLogprobs = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
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
