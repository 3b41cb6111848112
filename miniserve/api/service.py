"""The endpoints: from a valid request to the engine and back. Each is the handler of a route; its docstring stands in
OpenAPI. All raise `ApiError`, `ParameterError` and `EngineError`, which errors.py makes answers of."""

import asyncio
import hashlib
import time
from collections.abc import Mapping
from dataclasses import InitVar, dataclass
from datetime import UTC, datetime
from typing import Any

import msgspec
from fastapi import Request
from starlette.responses import Response

from miniserve import __version__
from miniserve.api import errors
from miniserve.api.errors import ApiError
from miniserve.api.fields import RequestBody, ignored_header
from miniserve.api.generation import AnswerHead, Choice, Generation, Prompts, Renderer, ResponseWriter
from miniserve.api.identity import speaker
from miniserve.api.messages.schemas import CountTokensRequest, MessagesRequest
from miniserve.api.messages.writer import MessagesWriter
from miniserve.api.openai.chat import ChatRenderer, ChatWriter, chat_tokens
from miniserve.api.openai.completions import CompletionRenderer, CompletionWriter
from miniserve.api.openai.parameters import GenerationRequest
from miniserve.api.openai.schemas import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from miniserve.api.streaming import EventStream, answer_events, json_answer, whole_answer
from miniserve.api.structured import GrammarChecks, requested
from miniserve.config import ServeConfig, problem
from miniserve.dispatcher import Dispatcher, EngineError, TurnStream
from miniserve.monitor.doctor import Doctor
from miniserve.monitor.metrics import Metrics
from miniserve.sampling_params import SamplingParams
from miniserve.text.dialect import find_dialect
from miniserve.text.grammar import Compiler
from miniserve.text.tokenizer import Tokenizer

MAX_SCORES = 2**16
"""Log-probabilities of prompts in one answer, alternatives included: a few megabytes."""
LIMITS = "max_output_tokens", "max_completion_tokens", "max_tokens"
"""The fields that bound an output; of several the first counts."""


@dataclass(eq=False)
class Service:
    """`client` need not have started yet. `defaults` is the model's generation_config.json, or empty for neutral
    sampling. `compiler` checks grammars. Raises `ConfigError` for the name of a parser that does not exist."""

    config: ServeConfig
    client: Dispatcher
    tokenizer: Tokenizer
    defaults: Mapping[str, Any]
    compiler: InitVar[Compiler]

    def __post_init__(self, compiler: Compiler) -> None:
        self.names = self.config.served_model_names or [self.config.engine.model]
        self.dialect = find_dialect(self.tokenizer, self.config.tool_call_parser, self.config.reasoning_parser)
        self.metrics = Metrics(self.client, self.names[0])
        self.doctor = Doctor(lambda ids: self.tokenizer.decode(ids, False), consent=self.config.log_prompts)
        self._examining: set[asyncio.Task[None]] = set()
        self._created = int(time.time())
        self._grammars = GrammarChecks(compiler)
        self._fingerprint = "fp_" + hashlib.sha256(f"{__version__} {self.names[0]}".encode()).hexdigest()[:10]

    async def chat_completions(self, request: Request, body: ChatRequest) -> Response:
        """Answer a conversation; with `stream` true as server-sent events."""
        renderer = ChatRenderer(self.tokenizer, self.dialect, body)
        head = self.head(f"chatcmpl-{request.state.request_id}", body.model)
        return await self.generate(request, body, body, renderer, ChatWriter(head, self.tokenizer, body))

    async def completions(self, request: Request, body: CompletionRequest) -> Response:
        """Go on with one or many texts; with `stream` true as server-sent events."""
        renderer = CompletionRenderer(self.tokenizer, body)
        head = self.head(f"cmpl-{request.state.request_id}", body.model)
        return await self.generate(request, body, body, renderer, CompletionWriter(head, self.tokenizer, body))

    async def messages(self, request: Request, body: MessagesRequest) -> Response:
        """Answer a conversation as the Anthropic API does; with `stream` true as server-sent events."""
        head = self.head(f"msg_{request.state.request_id}", body.model)
        with errors.renamed("messages"):
            chat = await asyncio.to_thread(body.chat, self.config.normalize_prompts)
            renderer = ChatRenderer(self.tokenizer, self.dialect, chat)
            return await self.generate(request, body, chat, renderer, MessagesWriter(head))

    async def generate(
        self,
        request: Request,
        asked: RequestBody,
        body: GenerationRequest,
        renderer: Renderer,
        writer: ResponseWriter,
        conversation: str | int = "",
    ) -> Response:
        """`body` is what the client has `asked`, as a chat or completion. `conversation` is that of the turn before, if
        the server knows it; the client's own name goes first."""
        arrived = time.perf_counter()
        named, said = speaker(request.headers, body, self.config.conversation_headers)
        if not named and conversation:
            said = msgspec.structs.replace(said, sure=True)
        prompts = await self._prepare(asked, body, renderer)
        id, conversation, salt = writer.head.id, named or conversation, body.cache_salt or ""

        def submit(prompt: list[int], params: SamplingParams, index: int) -> TurnStream:
            # Choices share a prompt: they belong where its KV is.
            of = conversation or (f"{id}-{index // params.n}" if params.n > 1 else "")
            return self.client.submit(prompt, params, conversation=of, salt=salt, request_id=f"{id}-{index}", said=said)

        def begun(choice: Choice) -> None:
            if choice.turn is not None and choice.turn.change is not None:
                examining = asyncio.create_task(self._examine(choice.turn, choice.cached_tokens, said.client, body))
                self._examining.add(examining)
                examining.add_done_callback(self._examining.discard)

        # The turns start before a stream's status is sent: with a full queue that is 503.
        self.client.check_room()
        generation = Generation(prompts, submit, self.tokenizer, self.metrics, arrived, renderer.reader, begun)
        generation.start()
        if body.stream:
            answer: Response = EventStream(answer_events(generation, writer), self.config.sse_ping, writer.ping)
        else:
            answer = await whole_answer(generation, writer, request.receive)
        answer.headers.update(ignored_header([*asked.ignored, *renderer.relaxed]))
        return answer

    async def _prepare(self, asked: RequestBody, body: GenerationRequest, renderer: Renderer) -> Prompts:
        """Check the request, render its prompts, compile their grammars. Raises `ApiError`, `ParameterError`."""
        self.check_model(body.model)
        params = body.sampling(self.defaults, self.client.vocab_size)
        wanted = None
        if body.format_field is not None:
            wanted = await asyncio.to_thread(requested, body, renderer.relaxed)
            await self._grammars.check(wanted, body.format_field)
            params = msgspec.structs.replace(params, grammar=wanted)
        # That of a completion is set even where the request has none, and `params` do not have it.
        default_limit = body.max_tokens or self.defaults.get("max_new_tokens")

        def render() -> Prompts:
            prompts = renderer.prompts()
            fitted = [self._fitted(prompt, params, default_limit, renderer.prompt_field) for prompt in prompts]
            if params.max_tokens and any(own.max_tokens != params.max_tokens for own in fitted):
                renderer.relaxed.add(next(name for name in LIMITS if getattr(asked, name, None)))
            return [(prompt, renderer.params(own, prompt)) for prompt, own in zip(prompts, fitted, strict=True)]

        # A long prompt takes a while, in which other streams go on.
        prompts = await asyncio.to_thread(render)
        scores = sum(len(ids) * p.n * (p.prompt_logprobs + 1) for ids, p in prompts if p.prompt_logprobs is not None)
        if scores > MAX_SCORES:
            raise ApiError(400, problem("api.scores", scores=scores, most=MAX_SCORES), param=renderer.prompt_field)
        # Where the format itself compiles, but the grammar of the whole answer does not, the tools are at fault.
        at_fault = "tools" if body.tool_names else body.format_field or ""
        for _, own in prompts:
            if own.grammar is not None and own.grammar is not wanted:
                await self._grammars.check(own.grammar, at_fault)
        return prompts

    async def _examine(self, turn: TurnStream, cached: int, client: str, body: GenerationRequest) -> None:
        """Find out why no more than `cached` tokens of a prompt were found, which differs from the one before."""
        assert turn.change is not None
        seen = turn.number, turn.change, cached, body.segments, body.tool_names
        found = await asyncio.to_thread(self.doctor.examine, *seen)
        if found is not None:
            counted = client if client in self.client.scheduler.reuse else ""
            self.doctor.note(counted, turn.conversation, found)
            self.metrics.missed(found[0]["kind"], found[0]["lost"])

    def head(self, id: str, model: str | None) -> AnswerHead:
        return AnswerHead(id, int(time.time()), model or self.names[0], self._fingerprint)

    def _fitted(
        self, prompt: list[int], params: SamplingParams, default_limit: int | None, field: str
    ) -> SamplingParams:
        """`params` with a `max_tokens` that fits into the context after `prompt`, the field `field` of a request. A
        client that sets none gets `default_limit`, or all the room there is. Raises `ApiError`, `ParameterError`."""
        if not prompt:
            raise ApiError(400, f"`{field}` holds no tokens: send at least one.", param=field)
        self._check_vocabulary(prompt, field)
        limit = self.client.max_model_len
        if (room := limit - len(prompt)) < 1:
            said = problem("api.long_prompt", limit=limit, field=field, tokens=len(prompt))
            anthropic = {"message": f"prompt is too long: {len(prompt)} tokens > {limit - 1} maximum"}
            raise ApiError(400, said, param=field, code="context_length_exceeded", anthropic=anthropic)
        wanted = params.max_tokens if params.max_tokens is not None else default_limit or room
        most = min(wanted, room)
        least = min(params.min_tokens, most) if params.max_tokens else params.min_tokens
        return msgspec.structs.replace(params, max_tokens=most, min_tokens=least).validate()

    def _check_vocabulary(self, tokens: list[int], field: str) -> None:
        size = self.client.vocab_size
        if tokens and max(tokens) >= size:
            raise ApiError(400, f"`{field}` holds token id {max(tokens)}: ids go from 0 to {size - 1}.", param=field)

    def check_model(self, name: str | None) -> None:
        """Raises `ApiError` for a name that is none of the model's."""
        if name is not None and name not in self.names:
            said = f"There is no model {name[:128]!r} here: this server has {', '.join(self.names)}."
            raise ApiError(404, said, param="model", code="model_not_found")

    async def count_tokens(self, body: CountTokensRequest) -> Response:
        """How many tokens the prompt of such a request has."""
        self.check_model(body.model)
        with errors.renamed("messages"):
            chat = await asyncio.to_thread(body.chat, self.config.normalize_prompts)
            tokens = await asyncio.to_thread(chat_tokens, self.tokenizer, self.dialect, chat)
        return json_answer({"input_tokens": len(tokens)}, body.ignored)

    async def tokenize(self, body: TokenizeRequest) -> Response:
        """The tokens of a prompt, or of messages as the chat template renders them."""
        self.check_model(body.model)
        if body.prompt is not None:
            tokens = await asyncio.to_thread(self.tokenizer.encode, body.prompt, body.add_special_tokens)
        else:
            tokens = await asyncio.to_thread(chat_tokens, self.tokenizer, self.dialect, body)
        answer = {"count": len(tokens), "max_model_len": self.client.max_model_len, "tokens": tokens}
        return json_answer(answer, body.ignored)

    async def detokenize(self, body: DetokenizeRequest) -> Response:
        """The text of tokens."""
        self.check_model(body.model)
        self._check_vocabulary(body.tokens, "tokens")
        text = await asyncio.to_thread(self.tokenizer.decode, body.tokens, False)
        return json_answer({"prompt": text}, body.ignored)

    async def models(self, request: Request) -> Response:
        """The names of the one model that is served; with the header `anthropic-version` in that API's shape."""
        data = [self._card(name, request) for name in self.names]
        if errors.is_anthropic(request.scope):
            return json_answer({"data": data, "has_more": False, "first_id": data[0]["id"], "last_id": data[-1]["id"]})
        return json_answer({"object": "list", "data": data})

    async def retrieve_model(self, request: Request, model: str) -> Response:
        """One of these names."""
        self.check_model(model)
        return json_answer(self._card(model, request))

    def _card(self, name: str, request: Request) -> dict[str, Any]:
        if errors.is_anthropic(request.scope):
            day = datetime.fromtimestamp(self._created, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
            return {"type": "model", "id": name, "display_name": name, "created_at": day}
        about = {"id": name, "object": "model", "created": self._created, "owned_by": "miniserve"}
        sizes = {"max_model_len": self.client.max_model_len, "vocab_size": self.client.vocab_size}
        return {**about, "root": self.config.engine.model, **sizes}

    async def health(self) -> Response:
        """Whether the engine can serve; needs no API key."""
        if reason := self.client.unhealthy_reason:
            raise EngineError(reason)
        return json_answer({"status": "ok"})

    async def version(self) -> Response:
        """The version of miniserve."""
        return json_answer({"version": __version__})
