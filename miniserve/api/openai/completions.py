"""/v1/completions: its prompts, and what choices look like there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from miniserve.api.generation import Choice, Generation
from miniserve.api.openai.answers import Completion, CompletionChoice, CompletionLogprobs, Head
from miniserve.api.openai.logprobs import CompletionLogprobWriter
from miniserve.api.openai.schemas import CompletionRequest
from miniserve.api.streaming import Chunks
from miniserve.cluster.messages import TokenLogprob
from miniserve.sampling_params import SamplingParams
from miniserve.text.reader import Part
from miniserve.text.tokenizer import Tokenizer


class CompletionTask:
    """What a request for completions asks of the model: to go on with each of its prompts."""

    def __init__(self, tokenizer: Tokenizer, request: CompletionRequest) -> None:
        self._tokenizer = tokenizer
        self._request = request

    def prompts(self) -> list[list[int]]:
        """The tokens of each prompt. Slow: not for the event loop."""
        return [
            self._tokenizer.encode(prompt, self._request.add_special_tokens) if isinstance(prompt, str) else prompt
            for prompt in self._request.prompt
        ]

    def params(self, params: SamplingParams, prompt: list[int]) -> SamplingParams:
        """The same for all."""
        return params

    def reader(self, prompt: list[int]) -> None:
        """None: all text is content."""


class CompletionShape(Chunks):
    """Choices as text completions, whole and in chunks. With `echo` the text of a choice begins with its prompt, but as
    with vLLM not where the prompt's ids are told."""

    id_prefix = "cmpl-"
    chunk_object = "text_completion"
    input_field = "prompt"

    def __init__(self, tokenizer: Tokenizer, request: CompletionRequest) -> None:
        self._tokenizer = tokenizer
        self._request = request
        self.token_ids = bool(request.return_token_ids)
        self.stream_options = request.stream_options
        self._writers: dict[int, CompletionLogprobWriter] = {}
        self._told_prompt: set[int] = set()

    def whole(self, head: Head, generation: Generation) -> Completion:
        """The answer in one piece, of choices that have ended."""
        taken = [(choice, *choice.take_text()) for choice in generation.choices]
        return {
            "id": head["id"],
            "object": "text_completion",
            "created": head["created"],
            "model": head["model"],
            "choices": [self._choice(c, self._echo(c) + text, logprobs, ended=True) for c, text, logprobs in taken],
            "usage": generation.usage,
        }

    def opening(self, choice: Choice) -> CompletionChoice | None:
        """The prompt, where it is to be echoed."""
        return self._choice(choice, self._echo(choice), []) if self._request.echo else None

    def beside_opening(self, choice: Choice) -> Mapping[str, Any]:
        """Nothing: here the choices themselves tell the prompt's ids."""
        return {}

    def piece(self, choice: Choice, part: Part, logprobs: list[TokenLogprob]) -> CompletionChoice:
        """More text."""
        assert isinstance(part, str)  # nobody reads anything else out of the text
        return self._choice(choice, part, logprobs)

    def closing(self, choice: Choice) -> CompletionChoice:
        """Says why the choice has ended."""
        return self._choice(choice, "", [], ended=True)

    def _choice(self, choice: Choice, text: str, logprobs: list[TokenLogprob], ended: bool = False) -> CompletionChoice:
        answer: CompletionChoice = {
            "index": choice.index,
            "text": text,
            "logprobs": self._logprobs(choice, logprobs),
            "finish_reason": choice.finish if ended else None,
            "stop_reason": choice.stop_reason if ended else None,
        }
        if self.token_ids:
            answer["prompt_token_ids"] = None if choice.index in self._told_prompt else choice.prompt
            answer["token_ids"] = choice.take_tokens()
            self._told_prompt.add(choice.index)
        return answer

    def _echo(self, choice: Choice) -> str:
        if not self._request.echo or self.token_ids:
            return ""
        prompt = self._request.prompt[choice.index // choice.params.n]
        return prompt if isinstance(prompt, str) else self._tokenizer.decode(prompt)

    def _logprobs(self, choice: Choice, logprobs: list[TokenLogprob]) -> CompletionLogprobs | None:
        if choice.params.logprobs is None:
            return None
        if choice.index not in self._writers:
            self._writers[choice.index] = CompletionLogprobWriter(self._tokenizer, choice.params.skip_special_tokens)
        return self._writers[choice.index].write(logprobs)
