"""/v1/chat/completions: its prompt, and its choices. The other APIs of chats share the prompt."""

from collections.abc import Mapping
from typing import Any

import msgspec

from miniserve.api.generation import Choice
from miniserve.api.openai.answers import ChunkWriter, chat_logprobs, prompt_logprobs
from miniserve.api.openai.schemas import ChatRequest, TokenizeRequest
from miniserve.api.tools import Tool, deferred, with_all_keys
from miniserve.cluster.messages import TokenLogprob
from miniserve.sampling_params import ParameterError, SamplingParams
from miniserve.text.answer_grammar import answer_grammar
from miniserve.text.dialect import Dialect, Reasoned
from miniserve.text.reader import MoreArguments, Part, Reader, Reasoning, ToolCall
from miniserve.text.tokenizer import Tokenizer


def chat_tokens(tokenizer: Tokenizer, dialect: Dialect, request: ChatRequest | TokenizeRequest) -> list[int]:
    """The prompt of a conversation. Slow: not for the event loop. Raises `ParameterError`."""

    def rendered(tools: list[Tool] | None) -> list[int]:
        messages = [message.for_template() for message in request.messages or []]
        return tokenizer.chat(
            dialect.messages(messages, tools),
            tools=tools or None if dialect.knows_tools else None,
            add_generation_prompt=request.add_generation_prompt,
            continue_final_message=bool(request.continue_final_message),
            template_kwargs=request.template_variables,
        )

    # Tools stay in the prompt when the model may call none, so that it begins like the prompt of the turn before.
    tools = [tool for tool in request.tools or [] if not deferred(tool)]
    try:
        return rendered(tools)
    except ParameterError:
        # Hermes' templates read a description and parameters of each tool, which clients may leave out.
        if (complete := [with_all_keys(tool) for tool in tools]) == tools:
            raise
        return rendered(complete)


class ChatRenderer:
    """A `Renderer`: the one prompt of a chat, the grammar of forced calls or of a format, and a reader of reasoning and
    calls. `relaxed` names what that grammar cannot hold of the tools' schemas."""

    prompt_field = "messages"

    def __init__(self, tokenizer: Tokenizer, dialect: Dialect, request: ChatRequest) -> None:
        self.relaxed: set[str] = set()
        self._tokenizer = tokenizer
        self._dialect = dialect
        self._request = request

    def prompts(self) -> list[list[int]]:
        return [chat_tokens(self._tokenizer, self._dialect, self._request)]

    def params(self, params: SamplingParams, prompt: list[int]) -> SamplingParams:
        """`params`, whose grammar is that of the format if there is one, with the grammar of the whole answer: if a
        call is forced, or the model may reason before the format or call a tool instead."""
        allowed, reasoned = self._request.allowed_calls, self._reasoned(prompt)
        wanted = None if allowed.forced else params.grammar
        tools = allowed.forced or (allowed.callable if wanted else [])
        if not tools and (wanted is None or reasoned == "over"):
            return params
        relaxed: set[str] = set()
        grammar = answer_grammar(
            self._dialect.form,
            tools,
            wanted,
            single=allowed.single,
            thinking=None if reasoned == "over" else self._dialect.thinking,
            opened=reasoned == "begun",
            tokenizer=self._tokenizer,
            relaxed=relaxed,
        )
        self.relaxed |= {f"tools.parameters.{key}" for key in relaxed}
        return msgspec.structs.replace(params, grammar=grammar)

    def reader(self, prompt: list[int]) -> Reader | None:
        allowed = self._request.allowed_calls
        opened, first = self._reasoned(prompt) == "begun", self._request.format_field is not None
        how = {"single": allowed.single, "first": first, "opened": opened, "early": bool(self._request.stream)}
        return self._dialect.reader(self._tokenizer, allowed.callable, **how)

    def _reasoned(self, prompt: list[int]) -> Reasoned:
        continued = None
        if self._request.continue_final_message:
            continued = self._request.messages[-1].for_template()["content"]
        return self._dialect.reasoned(self._tokenizer, prompt, continued)


class ChatWriter(ChunkWriter):
    """Choices as chat completions, whole and in chunks."""

    objects = "chat.completion", "chat.completion.chunk"

    def opening(self, choice: Choice) -> Mapping[str, Any]:
        delta = {"role": "assistant", "content": ""}
        return {"index": choice.index, "delta": delta, "logprobs": None, "finish_reason": None}

    def beside(self, choice: Choice) -> Mapping[str, Any]:
        more = {"prompt_token_ids": choice.prompt} if self.request.return_token_ids else {}
        return more | prompt_logprobs(self.tokenizer, choice, self.request.prompt_logprobs)

    def shown(
        self, choice: Choice, parts: list[Part], logprobs: list[TokenLogprob], *, chunk: bool, ended: bool
    ) -> Mapping[str, Any]:
        scored = choice.params.logprobs is not None and not (chunk and ended)
        return {
            "index": choice.index,
            **({"delta": _delta(*parts)} if chunk else {"message": _message(parts)}),
            "logprobs": chat_logprobs(self.tokenizer, logprobs) if scored else None,
            "finish_reason": choice.finish if ended else None,
            **({"stop_reason": choice.stop_reason} if ended else {}),
            **({"token_ids": choice.take_tokens()} if self.request.return_token_ids else {}),
        }


def _delta(part: Part | None = None) -> dict[str, Any]:
    if part is None:
        return {}
    if isinstance(part, str):
        return {"content": part}
    if isinstance(part, Reasoning):
        return {"reasoning": part.text, "reasoning_content": part.text}
    if isinstance(part, MoreArguments):
        return {"tool_calls": [{"index": part.index, "function": {"arguments": part.text}}]}
    return {"tool_calls": [{"index": part.index, **_call(part)}]}


def _message(parts: list[Part]) -> dict[str, Any]:
    content = "".join(part for part in parts if isinstance(part, str))
    reasoning = "".join(part.text for part in parts if isinstance(part, Reasoning))
    calls = [_call(part) for part in parts if isinstance(part, ToolCall)]
    message: dict[str, Any] = {
        "role": "assistant",
        "content": None if not content and (reasoning or calls) else content,
        "refusal": None,
    }
    if reasoning:
        message["reasoning"] = message["reasoning_content"] = reasoning
    if calls:
        message["tool_calls"] = calls
    return message


def _call(call: ToolCall) -> dict[str, Any]:
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
