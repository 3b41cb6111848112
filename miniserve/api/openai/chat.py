"""/v1/chat/completions: what choices look like there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from miniserve.api.generation import Choice, Generation
from miniserve.api.openai.answers import (
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatLogprobs,
    ChatMessageOut,
    Delta,
    Head,
    ToolCallOut,
)
from miniserve.api.openai.logprobs import chat_logprobs
from miniserve.api.openai.schemas import ChatRequest, StreamOptions, TokenizeRequest
from miniserve.api.streaming import Chunks
from miniserve.api.tools import Tool, with_all_keys
from miniserve.cluster.messages import TokenLogprob
from miniserve.sampling_params import ParameterError, SamplingParams
from miniserve.text.answer_grammar import answer_grammar
from miniserve.text.dialect import Dialect, Reasoned
from miniserve.text.reader import Part, Reader, Reasoning, ToolCall
from miniserve.text.tokenizer import Tokenizer


def chat_tokens(tokenizer: Tokenizer, dialect: Dialect, request: ChatRequest | TokenizeRequest) -> list[int]:
    """The prompt of a conversation. Slow: not for the event loop. Raises `ParameterError`."""

    def rendered(tools: list[Tool] | None) -> list[int]:
        messages = [message.for_template() for message in request.messages or []]
        return tokenizer.chat(
            dialect.messages(messages, tools),
            tools=tools or None if dialect.knows_tools else None,
            add_generation_prompt=request.add_generation_prompt,
            continue_final_message=request.continue_final_message,
            template_kwargs=request.template_variables,
        )

    # Tools stay in the prompt when none may be called, so that it begins like that of the turn before.
    try:
        return rendered(request.tools)
    except ParameterError:
        # Hermes' templates read a description and parameters of each tool, which clients may leave out.
        if not request.tools or (complete := [with_all_keys(tool) for tool in request.tools]) == request.tools:
            raise
        return rendered(complete)


class ChatTask:
    """What a request for a chat completion asks of the model: a prompt, perhaps a call, somebody to read the answer."""

    def __init__(self, tokenizer: Tokenizer, dialect: Dialect, request: ChatRequest) -> None:
        self._tokenizer = tokenizer
        self._dialect = dialect
        self._request = request

    def prompts(self) -> list[list[int]]:
        """The one prompt. Slow: not for the event loop. Raises `ParameterError`."""
        return [chat_tokens(self._tokenizer, self._dialect, self._request)]

    def params(self, params: SamplingParams, prompt: list[int]) -> SamplingParams:
        """`params`, whose grammar is that of the format if there is one, with the grammar of the whole answer: where a
        call is forced, or there may be reasoning or a call instead of the format. Slow, too."""
        calling, reasoned = self._request.calling, self._reasoned(prompt)
        wanted = None if calling.forced else params.grammar
        tools = calling.forced or (calling.callable if wanted else [])
        if not tools and (wanted is None or reasoned == "over"):
            return params
        grammar = answer_grammar(
            self._dialect.form,
            tools,
            wanted,
            single=calling.single,
            thinking=None if reasoned == "over" else self._dialect.thinking,
            opened=reasoned == "begun",
            tokenizer=self._tokenizer,
        )
        return msgspec.structs.replace(params, grammar=grammar)

    def reader(self, prompt: list[int]) -> Reader | None:
        """What reads one answer; None where all of it is content."""
        calling = self._request.calling
        return self._dialect.reader(
            self._tokenizer,
            calling.callable,
            single=calling.single,
            first=self._request.format_field is not None,
            opened=self._reasoned(prompt) == "begun",
        )

    def _reasoned(self, prompt: list[int]) -> Reasoned:
        continued = None
        if self._request.continue_final_message:
            continued = self._request.messages[-1].for_template()["content"]
        return self._dialect.reasoned(self._tokenizer, prompt, continued)


class ChatShape(Chunks):
    """Choices as chat completions, whole and in chunks; with `token_ids` they tell those of prompt and answer."""

    id_prefix = "chatcmpl-"
    chunk_object = "chat.completion.chunk"
    input_field = "messages"

    def __init__(
        self, tokenizer: Tokenizer, token_ids: bool = False, stream_options: StreamOptions | None = None
    ) -> None:
        self.token_ids = token_ids
        self.stream_options = stream_options
        self._tokenizer = tokenizer

    def whole(self, head: Head, generation: Generation) -> ChatCompletion:
        """The answer in one piece, of choices that have ended."""
        answer: ChatCompletion = {
            "id": head["id"],
            "object": "chat.completion",
            "created": head["created"],
            "model": head["model"],
            "choices": [self._choice(choice) for choice in generation.choices],
            "usage": generation.usage,
        }
        if self.token_ids:
            answer["prompt_token_ids"] = generation.choices[0].prompt
        return answer

    def opening(self, choice: Choice) -> ChatChunkChoice:
        """Says who speaks."""
        delta: Delta = {"role": "assistant", "content": ""}
        return {"index": choice.index, "delta": delta, "logprobs": None, "finish_reason": None}

    def beside_opening(self, choice: Choice) -> Mapping[str, Any]:
        """The prompt's ids, if they were asked for."""
        return {"prompt_token_ids": choice.prompt} if self.token_ids else {}

    def piece(self, choice: Choice, part: Part, logprobs: list[TokenLogprob]) -> ChatChunkChoice:
        """A further part of the answer."""
        told = self._logprobs(choice, logprobs)
        chunk: ChatChunkChoice = {
            "index": choice.index,
            "delta": _delta(part),
            "logprobs": told,
            "finish_reason": None,
        }
        if self.token_ids:
            chunk["token_ids"] = choice.take_tokens()
        return chunk

    def closing(self, choice: Choice) -> ChatChunkChoice:
        """Says why the choice has ended."""
        chunk: ChatChunkChoice = {
            "index": choice.index,
            "delta": {},
            "logprobs": None,
            "finish_reason": choice.finish,
            "stop_reason": choice.stop_reason,
        }
        if self.token_ids:
            chunk["token_ids"] = choice.take_tokens()
        return chunk

    def _choice(self, choice: Choice) -> ChatChoice:
        parts, logprobs = choice.take()
        answer: ChatChoice = {
            "index": choice.index,
            "message": _message(parts),
            "logprobs": self._logprobs(choice, logprobs),
            "finish_reason": choice.finish,
            "stop_reason": choice.stop_reason,
        }
        if self.token_ids:
            answer["token_ids"] = choice.take_tokens()
        return answer

    def _logprobs(self, choice: Choice, logprobs: list[TokenLogprob]) -> ChatLogprobs | None:
        return None if choice.params.logprobs is None else chat_logprobs(self._tokenizer, logprobs)


def _delta(part: Part) -> Delta:
    if isinstance(part, str):
        return {"content": part}
    if isinstance(part, Reasoning):
        return {"reasoning": part.text, "reasoning_content": part.text}
    return {"tool_calls": [{"index": part.index, **_call(part)}]}


def _message(parts: list[Part]) -> ChatMessageOut:
    content = "".join(part for part in parts if isinstance(part, str))
    reasoning = "".join(part.text for part in parts if isinstance(part, Reasoning))
    calls = [_call(part) for part in parts if isinstance(part, ToolCall)]
    message: ChatMessageOut = {
        "role": "assistant",
        "content": None if not content and (reasoning or calls) else content,
        "refusal": None,
    }
    if reasoning:
        message["reasoning"] = message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = calls
    return message


def _call(call: ToolCall) -> ToolCallOut:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
