"""The way from a valid request to the engine and back."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Mapping
from typing import Any, Protocol

import msgspec
from fastapi import Request
from starlette.datastructures import Headers
from starlette.responses import Response

from miniserve.api import errors
from miniserve.api.errors import ApiError
from miniserve.api.fields import MAX_KEY_CHARS, RequestBody
from miniserve.api.generation import Generation
from miniserve.api.messages.answers import MessagesShape, TokenCount
from miniserve.api.messages.schemas import NAMES as MESSAGES_NAMES
from miniserve.api.messages.schemas import CountTokensRequest, MessagesRequest
from miniserve.api.openai.answers import Detokenized, Head, Tokenized
from miniserve.api.openai.chat import ChatShape, ChatTask, chat_tokens
from miniserve.api.openai.completions import CompletionShape, CompletionTask
from miniserve.api.openai.schemas import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    GenerationRequest,
    TokenizeRequest,
)
from miniserve.api.parameters import ignored_header
from miniserve.api.responses.answers import ResponsesShape, going_on, not_kept, previous
from miniserve.api.responses.schemas import NAMES as RESPONSES_NAMES
from miniserve.api.responses.schemas import AnyItem, ResponsesRequest
from miniserve.api.responses.store import ResponseStore
from miniserve.api.responses.types import ResponseDeleted
from miniserve.api.streaming import ClientGone, EventStream, while_connected
from miniserve.api.structured import GrammarChecks
from miniserve.dispatcher import Dispatcher, TurnStream
from miniserve.monitor.metrics import Metrics
from miniserve.sampling_params import SamplingParams
from miniserve.text.dialect import Dialect
from miniserve.text.reader import Reader
from miniserve.text.tokenizer import Tokenizer

CONVERSATION_HEADERS = ("X-Conversation-ID", "X-Session-ID", "X-Session-Token")


class Shape(Protocol):
    """How the answers of one of the APIs look. A stream ends with `ending`.

    `id_is_a_key`: whoever knows an answer's id can use it. Then clients do not choose it.
    """

    id_prefix: str
    chunk_object: str
    input_field: str
    id_is_a_key: bool
    ending: bytes

    def whole(self, head: Head, generation: Generation) -> Mapping[str, Any]:
        """The answer in one piece, of choices that have ended."""

    def stream(self, head: Head, generation: Generation) -> AsyncIterator[bytes]:
        """Events, some at a time. Raises what the generation failed of."""

    def broken(self, error: ApiError) -> bytes:
        """The event of what a stream failed of."""


class Task(Protocol):
    """What a request asks of the model."""

    def prompts(self) -> list[list[int]]:
        """Token ids of each prompt. Slow: not for the event loop. Raises `ParameterError`."""

    def params(self, params: SamplingParams, prompt: list[int]) -> SamplingParams:
        """`params` as they are for that prompt. Slow, too. Raises `ParameterError`."""

    def reader(self, prompt: list[int]) -> Reader | None:
        """What reads one answer to it; None where all of it is content."""


class Service:
    """Answers requests. `names` are what the model is called, `defaults` is its generation_config.json."""

    def __init__(
        self,
        client: Dispatcher,
        tokenizer: Tokenizer,
        dialect: Dialect,
        names: list[str],
        defaults: Mapping[str, Any],
    ) -> None:
        self.metrics = Metrics(client, names[0])
        self._client = client
        self._tokenizer = tokenizer
        self._dialect = dialect
        self._names = names
        self._defaults = defaults
        self._grammars = GrammarChecks(tokenizer)
        self._responses: ResponseStore[AnyItem] = ResponseStore()

    async def chat(self, request: Request, body: ChatRequest) -> Response:
        """Answer /v1/chat/completions. Raises `ApiError`, `ParameterError`, `EngineError`."""
        shape = ChatShape(self._tokenizer, bool(body.return_token_ids), body.stream_options)
        return told(await self._generate(request, body, shape, ChatTask(self._tokenizer, self._dialect, body)), body)

    async def complete(self, request: Request, body: CompletionRequest) -> Response:
        """Answer /v1/completions. Raises `ApiError`, `ParameterError`, `EngineError`."""
        shape = CompletionShape(self._tokenizer, body)
        return told(await self._generate(request, body, shape, CompletionTask(self._tokenizer, body)), body)

    async def respond(self, request: Request, body: ResponsesRequest) -> Response:
        """Answer /v1/responses. Raises `ApiError`, `EngineError`."""
        before = previous(self._responses, body.previous_response_id)
        items = [*(before.items if before else ()), *body.items]
        with errors.in_words_of(RESPONSES_NAMES):
            chat = body.chat(items)
            shape = ResponsesShape(body, items, self._responses)
            task = ChatTask(self._tokenizer, self._dialect, chat)
            with going_on(before) as home:
                response = await self._generate(request, chat, shape, task, home)
        return told(response, body)

    def stored_response(self, id: str) -> Response:
        """Answer GET /v1/responses/ID. Raises `ApiError`."""
        if (stored := self._responses.get(id)) is None:
            raise not_kept(id)
        return Response(stored.answer, media_type="application/json")

    def delete_response(self, id: str) -> ResponseDeleted:
        """Answer DELETE /v1/responses/ID. Raises `ApiError`."""
        if not self._responses.delete(id):
            raise not_kept(id)
        return {"id": id, "object": "response", "deleted": True}

    async def message(self, request: Request, body: MessagesRequest) -> Response:
        """Answer /v1/messages. Raises `ApiError`, `EngineError`."""
        with errors.in_words_of(MESSAGES_NAMES):
            chat = body.chat()
            task = ChatTask(self._tokenizer, self._dialect, chat)
            return told(await self._generate(request, chat, MessagesShape(), task), body)

    async def count_tokens(self, body: CountTokensRequest) -> TokenCount:
        """Answer /v1/messages/count_tokens. Raises `ApiError`."""
        self.check_model(body.model)
        with errors.in_words_of(MESSAGES_NAMES):
            tokens = await asyncio.to_thread(chat_tokens, self._tokenizer, self._dialect, body.chat())
        return {"input_tokens": len(tokens)}

    async def tokenize(self, body: TokenizeRequest) -> Tokenized:
        """Answer /tokenize. Raises `ApiError`, `ParameterError`."""
        self.check_model(body.model)
        if body.prompt is not None:
            tokens = await asyncio.to_thread(self._tokenizer.encode, body.prompt, body.add_special_tokens)
        else:
            tokens = await asyncio.to_thread(chat_tokens, self._tokenizer, self._dialect, body)
        return {
            "count": len(tokens),
            "max_model_len": self._client.max_model_len,
            "tokens": tokens,
            "token_strs": [self._tokenizer.token_text(t) for t in tokens] if body.return_token_strs else None,
        }

    async def detokenize(self, body: DetokenizeRequest) -> Detokenized:
        """Answer /detokenize. Raises `ApiError`."""
        self.check_model(body.model)
        self._check_vocabulary(body.tokens, "tokens")
        return {"prompt": await asyncio.to_thread(self._tokenizer.decode, body.tokens, False)}

    def check_model(self, name: str | None) -> None:
        """Raises `ApiError` for a name that is none of the model's."""
        if name is not None and name not in self._names:
            raise ApiError(
                404,
                f"There is no model {name[:128]!r} here: this server has {', '.join(self._names)}.",
                param="model",
                code="model_not_found",
            )

    async def _generate(
        self, request: Request, body: GenerationRequest, shape: Shape, task: Task, before: str | int = ""
    ) -> Response:
        """`before` is the conversation of the turn before, where that is known and the client does not say another."""
        arrived = time.perf_counter()
        self.check_model(body.model)
        params = body.sampling(self._defaults, self._client.vocab_size)
        if grammar := await self._grammars.wanted(body):
            params = msgspec.structs.replace(params, grammar=grammar)
        conversation = _conversation_id(request.headers) or body.prompt_cache_key or before
        default_limit = body.default_limit or self._defaults.get("max_new_tokens")

        def prepared() -> list[tuple[list[int], SamplingParams]]:
            return [
                (prompt, task.params(self._fitted(prompt, params, default_limit, shape.input_field), prompt))
                for prompt in task.prompts()
            ]

        # A long prompt takes a while, in which other streams want to go on.
        prompts = await asyncio.to_thread(prepared)
        for _, own in prompts:
            if own.grammar is not None and own.grammar is not grammar:
                await self._grammars.check(own.grammar, body.grammar_field)
        head: Head = {
            "id": shape.id_prefix + (uuid.uuid4().hex if shape.id_is_a_key else request.state.request_id),
            "object": shape.chunk_object,
            "created": int(time.time()),
            "model": body.model or self._names[0],
        }

        def submit(prompt: list[int], params: SamplingParams, number: int) -> TurnStream:
            return self._client.submit(
                prompt,
                params,
                # Choices share a prompt: they belong where its KV is.
                conversation=conversation or (f"{head['id']}-{number // params.n}" if params.n > 1 else ""),
                salt=body.cache_salt or "",
                request_id=f"{head['id']}-{number}",
                tool=body.ends_in_tool_result,
            )

        generation = Generation(prompts, submit, self._tokenizer, self.metrics, arrived, task.reader)
        self._client.check_room()
        generation.start()  # before a stream's status is sent: a full queue is a 503
        if body.stream:
            return EventStream(generation, shape.stream(head, generation), shape.broken, shape.ending)
        try:
            async with generation:
                await while_connected(request.receive, generation.finish())
        except ClientGone:
            return Response(status_code=499)  # for the log; nobody reads it
        return Response(msgspec.json.encode(shape.whole(head, generation)), media_type="application/json")

    def _check_vocabulary(self, tokens: list[int], param: str) -> None:
        size = self._client.vocab_size
        if tokens and max(tokens) >= size:
            raise ApiError(400, f"`{param}` holds token id {max(tokens)}: ids go from 0 to {size - 1}.", param=param)

    def _fitted(
        self, prompt: list[int], params: SamplingParams, default_limit: int | None, param: str
    ) -> SamplingParams:
        """`params` with a `max_tokens` that fits into the context after `prompt`.

        A client that sets none gets `default_limit`, or what room there is. Raises `ApiError`, `ParameterError`.
        """
        if not prompt:
            raise ApiError(400, f"`{param}` holds no tokens: send at least one.", param=param)
        self._check_vocabulary(prompt, param)
        limit = self._client.max_model_len
        room = limit - len(prompt)
        if room < (params.max_tokens or 1):
            wanted = f"{params.max_tokens} to generate" if params.max_tokens else "at least 1 to generate"
            fix = f"ask for at most {room} new tokens, or shorten the input" if room > 0 else "shorten the input"
            raise ApiError(
                400,
                f"This model's maximum context length is {limit} tokens, but you asked for "
                f"{len(prompt) + (params.max_tokens or 1)}: {len(prompt)} in `{param}` and {wanted}. To fix it, {fix}.",
                param=param,
                code="context_length_exceeded",
            )
        return msgspec.structs.replace(
            params, max_tokens=params.max_tokens or min(default_limit or room, room)
        ).validate()


def told(response: Response, body: RequestBody) -> Response:
    """`response`, with the names of parameters that were ignored."""
    response.headers.update(ignored_header(body.ignored))
    return response


def _conversation_id(headers: Headers) -> str:
    """The conversation that the client says this turn belongs to, or nothing. Raises `ApiError`."""
    for name in CONVERSATION_HEADERS:
        if found := headers.get(name):
            if len(found) > MAX_KEY_CHARS:
                raise ApiError(400, f"`{name}` is longer than {MAX_KEY_CHARS} characters: shorten it.", param=name)
            return found
    return ""
