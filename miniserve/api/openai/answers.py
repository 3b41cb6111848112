"""The answers to chats, completions and questions about models and tokens, as types: mypy checks the code that builds
them, and OpenAPI documents them.

Shapes and names are OpenAI's; `stop_reason`, `max_model_len`, token ids and everything about tokenizing are vLLM's.
"""

import codecs
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


class ChatCompletion(TypedDict):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: NotRequired[list[int]]


class CompletionLogprobs(TypedDict):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(TypedDict):
    """A choice, or in a stream a piece of it; only its first chunk has the prompt's ids."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Finish | None
    stop_reason: str | int | None
    prompt_token_ids: NotRequired[list[int] | None]
    token_ids: NotRequired[list[int]]


class Completion(TypedDict):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


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


class CompletionLogprobWriter:
    """Log-probabilities as completions have them. A writer is for one choice: it counts the characters of its text."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool) -> None:
        self._tokenizer = tokenizer
        self._skip = tokenizer.special_ids if skip_special_tokens else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0

    def write(self, entries: list[TokenLogprob]) -> CompletionLogprobs:
        out: CompletionLogprobs = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for entry in entries:
            logprob = max(entry.logprob, LOWEST)
            name = self._name(entry.token)
            out["tokens"].append(name)
            out["token_logprobs"].append(logprob)
            # The sampled token is always among the alternatives, even if it is not one of the most likely.
            tops = {self._name(token): max(value, LOWEST) for token, value in entry.top}
            out["top_logprobs"].append(tops | {name: logprob})
            out["text_offset"].append(self._offset)
            if entry.token not in self._skip:
                self._offset += len(self._decoder.decode(self._tokenizer.token_bytes(entry.token)))
        return out

    def _name(self, token: int) -> str:
        """The token's text, or its bytes if it is a part of a character, since names must differ."""
        data = self._tokenizer.token_bytes(token)
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
