"""/v1/completions: its prompts, and its choices."""

from miniserve.api.generation import Choice, Generation
from miniserve.api.openai import answers
from miniserve.api.openai.chunks import ChunkWriter
from miniserve.api.openai.schemas import CompletionRequest
from miniserve.api.protocols import AnswerHead
from miniserve.cluster.messages import TokenLogprob
from miniserve.sampling_params import SamplingParams
from miniserve.text.reader import Part
from miniserve.text.tokenizer import Tokenizer


class CompletionRenderer:
    """A `Renderer`: the model continues each of a request's prompts, and all text is content."""

    prompt_field = "prompt"

    def __init__(self, tokenizer: Tokenizer, request: CompletionRequest) -> None:
        self.relaxed: list[str] = []
        self._tokenizer = tokenizer
        self._request = request

    def prompts(self) -> list[list[int]]:
        return [
            self._tokenizer.encode(prompt, self._request.add_special_tokens) if isinstance(prompt, str) else prompt
            for prompt in self._request.prompt
        ]

    def params(self, params: SamplingParams, prompt: list[int]) -> SamplingParams:
        return params

    def reader(self, prompt: list[int]) -> None:
        return None


class CompletionWriter(ChunkWriter):
    """Choices as text completions, whole and in chunks. With `echo` the text of a choice begins with its prompt, unless
    the answer holds the prompt's ids (as with vLLM)."""

    chunk_object = "text_completion"

    def __init__(self, head: AnswerHead, tokenizer: Tokenizer, request: CompletionRequest) -> None:
        super().__init__(head, tokenizer, request)
        self._request = request
        self._logprob_writers: dict[int, answers.CompletionLogprobWriter] = {}
        self._prompt_sent: set[int] = set()

    def response(self, generation: Generation) -> answers.Completion:
        taken = [(choice, *choice.take_text()) for choice in generation.choices]
        return {
            "id": self.head.id,
            "object": "text_completion",
            "created": self.head.created,
            "model": self.head.model,
            "choices": [self._choice(c, self._echo(c) + text, logprobs, ended=True) for c, text, logprobs in taken],
            "usage": answers.usage(generation, generation.output_tokens),
        }

    def opening(self, choice: Choice) -> answers.CompletionChoice | None:
        return self._choice(choice, self._echo(choice), []) if self._request.echo else None

    def piece(self, choice: Choice, part: Part, logprobs: list[TokenLogprob]) -> answers.CompletionChoice:
        assert isinstance(part, str)  # without a reader there are no other parts
        return self._choice(choice, part, logprobs)

    def closing(self, choice: Choice) -> answers.CompletionChoice:
        return self._choice(choice, "", [], ended=True)

    def _choice(
        self, choice: Choice, text: str, logprobs: list[TokenLogprob], ended: bool = False
    ) -> answers.CompletionChoice:
        answer: answers.CompletionChoice = {
            "index": choice.index,
            "text": text,
            "logprobs": self._logprobs(choice, logprobs),
            "finish_reason": choice.finish if ended else None,
            "stop_reason": choice.stop_reason if ended else None,
        }
        if self.token_ids:
            answer["prompt_token_ids"] = None if choice.index in self._prompt_sent else choice.prompt
            answer["token_ids"] = choice.take_tokens()
            self._prompt_sent.add(choice.index)
        return answer

    def _echo(self, choice: Choice) -> str:
        if not self._request.echo or self.token_ids:
            return ""
        prompt = self._request.prompt[choice.index // choice.params.n]
        return prompt if isinstance(prompt, str) else self._tokenizer.decode(prompt)

    def _logprobs(self, choice: Choice, logprobs: list[TokenLogprob]) -> answers.CompletionLogprobs | None:
        if choice.params.logprobs is None:
            return None
        if choice.index not in self._logprob_writers:
            writer = answers.CompletionLogprobWriter(self._tokenizer, choice.params.skip_special_tokens)
            self._logprob_writers[choice.index] = writer
        return self._logprob_writers[choice.index].write(logprobs)
