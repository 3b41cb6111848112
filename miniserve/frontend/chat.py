"""/v1/chat/completions: what choices look like there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from miniserve.cluster.messages import TokenLogprob
from miniserve.frontend.generate import Choice, Generation
from miniserve.frontend.logprobs import chat_logprobs
from miniserve.frontend.responses import ChatChoice, ChatChunkChoice, ChatCompletion, ChatLogprobs, Delta, Head
from miniserve.frontend.schemas import ChatRequest, TokenizeRequest
from miniserve.tokenizer import Tokenizer


def chat_tokens(tokenizer: Tokenizer, request: ChatRequest | TokenizeRequest) -> list[int]:
    """The prompt of a conversation. Slow: not for the event loop. Raises `ParameterError`."""
    return tokenizer.chat(
        [message.for_template() for message in request.messages or []],
        add_generation_prompt=request.add_generation_prompt,
        continue_final_message=request.continue_final_message,
        template_kwargs=request.chat_template_kwargs,
    )


class ChatShape:
    """Choices as chat completions, whole and in chunks; with `token_ids` they tell those of prompt and answer."""

    id_prefix = "chatcmpl-"
    chunk_object = "chat.completion.chunk"
    input_field = "messages"

    def __init__(self, tokenizer: Tokenizer, token_ids: bool = False) -> None:
        self.token_ids = token_ids
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

    def piece(self, choice: Choice, text: str, logprobs: list[TokenLogprob]) -> ChatChunkChoice:
        """More text."""
        told = self._logprobs(choice, logprobs)
        chunk: ChatChunkChoice = {
            "index": choice.index,
            "delta": {"content": text},
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
        text, logprobs = choice.take()
        answer: ChatChoice = {
            "index": choice.index,
            "message": {"role": "assistant", "content": text, "refusal": None},
            "logprobs": self._logprobs(choice, logprobs),
            "finish_reason": choice.finish,
            "stop_reason": choice.stop_reason,
        }
        if self.token_ids:
            answer["token_ids"] = choice.take_tokens()
        return answer

    def _logprobs(self, choice: Choice, logprobs: list[TokenLogprob]) -> ChatLogprobs | None:
        return None if choice.params.logprobs is None else chat_logprobs(self._tokenizer, logprobs)
