"""/v1/responses: a chat's answer as a response, whole and as events."""

import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

from miniserve.api.errors import ApiError
from miniserve.api.generation import Choice, Generation
from miniserve.api.protocols import AnswerHead
from miniserve.api.responses.output import OutputItems
from miniserve.api.responses.schemas import ResponsesRequest
from miniserve.api.responses.tools import Offered
from miniserve.api.streaming import COMMENT, NamedEvent, named_event
from miniserve.cluster.messages import TokenLogprob
from miniserve.text.tokenizer import Tokenizer

REPEATED = {"instructions", "max_output_tokens", "previous_response_id", "prompt_cache_key"}
"""Parameters that an answer repeats as they came."""
SAMPLED = ("temperature", "top_p", "frequency_penalty", "presence_penalty")
"""Those that it repeats as they were used."""
NOTHING_YET = ("completed_at", "error", "incomplete_details", "usage", "max_tool_calls", "safety_identifier", "user")
"""Fields that are null, most of them until the end."""


@dataclass(eq=False)
class ResponsesWriter:
    """A `ResponseWriter` of the answer to one request, whose calls may be of the `offered` tools. `keep` stores the
    answer when that is complete."""

    ping = COMMENT

    head: AnswerHead
    request: ResponsesRequest
    offered: Mapping[str, Offered]
    tokenizer: Tokenizer
    keep: Callable[[dict[str, Any], Choice], None]

    def __post_init__(self) -> None:
        self._numbers = count()
        self._begun: dict[str, Any] | None = None
        self._logprobs: list[TokenLogprob] = []  # of text that is still to come
        self._reasoned = 0  # tokens whose log-probabilities were passed over

    def response(self, generation: Generation) -> dict[str, Any]:
        (choice,) = generation.choices
        output = self._output(choice)
        self._feed(choice, output)
        return self._ended(self._in_progress(choice), output, choice)

    async def stream(self, generation: Generation) -> AsyncIterator[bytes]:
        (choice,) = generation.choices
        self._begun = begun = self._in_progress(choice)
        yield self._encoded([(f"response.{event}", {"response": begun}) for event in ("created", "in_progress")])
        output = self._output(choice)
        async for _ in generation.updates():
            events = self._feed(choice, output)
            if choice.finish is not None:
                response = self._ended(begun, output, choice)
                events.append((f"response.{response['status']}", {"response": response}))
            if events:
                yield self._encoded(events)

    def _output(self, choice: Choice) -> OutputItems:
        return OutputItems(self.offered, None if choice.params.logprobs is None else self.tokenizer)

    def _feed(self, choice: Choice, output: OutputItems) -> list[NamedEvent]:
        """Tell `output` what has come, and the end. Texts have log-probabilities, reasoning has none."""
        parts, logprobs = choice.take()
        self._logprobs += logprobs[choice.reasoning_tokens - self._reasoned :]
        self._reasoned = choice.reasoning_tokens
        events: list[NamedEvent] = []
        for part in parts:
            events += output.feed(part, self._logprobs)
            if isinstance(part, str):
                self._logprobs = []
        return events + (output.end(choice.finish == "length") if choice.finish is not None else [])

    def error_events(self, error: ApiError) -> bytes:
        code = "server_error" if error.status_code >= 500 else "invalid_prompt"
        about = {"code": error.code or code, "message": error.message, "param": error.param}
        events: list[NamedEvent] = [("error", about)]
        if self._begun is not None:
            response = {**self._begun, "status": "failed", "error": {"code": code, "message": error.message}}
            events.append(("response.failed", {"response": response}))
        return self._encoded(events)

    def _encoded(self, events: Sequence[NamedEvent]) -> bytes:
        return b"".join(named_event(name, {"sequence_number": next(self._numbers), **data}) for name, data in events)

    def _in_progress(self, choice: Choice) -> dict[str, Any]:
        asked, text = self.request, self.request.text
        form = text.format.model_dump(by_alias=True, exclude_none=True) if text and text.format else {"type": "text"}
        functions = {"description": None, "parameters": None, "strict": None}
        tools = [{**(functions if tool["type"] == "function" else {}), **tool} for tool in asked.tools or []]
        begun: dict[str, Any] = {
            "id": self.head.id,
            "object": "response",
            "created_at": self.head.created,
            "status": "in_progress",
            "model": self.head.model,
            "output": [],
            **asked.model_dump(include=REPEATED),
            **{name: getattr(choice.params, name) for name in SAMPLED},
            "background": False,
            "metadata": asked.metadata or {},
            "parallel_tool_calls": asked.parallel_tool_calls is not False,
            "reasoning": {"effort": asked.reasoning.effort if asked.reasoning else None, "summary": None},
            "service_tier": "default",
            "store": asked.store is not False,
            "text": {"format": form},
            "tool_choice": asked.tool_choice or "auto",
            "tools": tools,
            "top_logprobs": asked.top_logprobs or 0,
            "truncation": asked.truncation or "disabled",
            **dict.fromkeys(NOTHING_YET),
        }
        if asked.conversation:
            begun["conversation"] = {"id": asked.conversation}
        return begun

    def _ended(self, begun: dict[str, Any], output: OutputItems, choice: Choice) -> dict[str, Any]:
        cut_off = choice.finish == "length"
        answer: dict[str, Any] = {
            **begun,
            "completed_at": None if cut_off else int(time.time()),
            "status": "incomplete" if cut_off else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if cut_off else None,
            "output": output.items,
            "usage": {
                "input_tokens": choice.prompt_tokens,
                "input_tokens_details": {"cached_tokens": choice.cached_tokens, "cache_write_tokens": 0},
                "output_tokens": choice.output_tokens,
                "output_tokens_details": {"reasoning_tokens": choice.reasoning_tokens},
                "total_tokens": choice.prompt_tokens + choice.output_tokens,
            },
        }
        # A client may go on as soon as it has read the last event, so the answer is kept before that.
        self.keep(answer, choice)
        return answer
