"""/v1/completions: its prompts, and its choices."""

import codecs
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec

from miniserve.api.generation import Choice
from miniserve.api.openai.answers import LOWEST, ChunkWriter, prompt_logprobs
from miniserve.api.openai.schemas import CompletionRequest
from miniserve.cluster.messages import TokenLogprob
from miniserve.config import problem
from miniserve.sampling_params import ParameterError, SamplingParams
from miniserve.text.formats import FILL_IN_THE_MIDDLE
from miniserve.text.reader import Part
from miniserve.text.tokenizer import Tokenizer

Scored = Sequence[tuple[int, TokenLogprob | None]]


class CompletionRenderer:
    """A `Renderer`: the model continues each of a request's prompts, up to its suffix. All text is content."""

    prompt_field = "prompt"

    def __init__(self, tokenizer: Tokenizer, request: CompletionRequest) -> None:
        self.relaxed: set[str] = set()
        self._tokenizer = tokenizer
        self._request = request

    def prompts(self) -> list[list[int]]:
        before, gap, after = self._marks() if self._request.suffix else ("", "", "")
        rest = f"{gap}{self._request.suffix or ''}{after}"
        return [
            self._tokenizer.encode(before + prompt + rest, self._request.add_special_tokens)
            if isinstance(prompt, str)
            else prompt
            for prompt in self._request.prompt
        ]

    def _marks(self) -> list[str]:
        for marks in FILL_IN_THE_MIDDLE:
            if all(self._tokenizer.control_id(mark) is not None for mark in marks):
                return marks
        raise ParameterError("suffix", problem("api.suffix"))

    def params(self, params: SamplingParams, prompt: list[int]) -> SamplingParams:
        """With `echo` log-probabilities are of the prompt too."""
        if not self._request.echo or params.logprobs is None:
            return params
        return msgspec.structs.replace(params, prompt_logprobs=max(params.logprobs, params.prompt_logprobs or 0))

    def reader(self, prompt: list[int]) -> None:
        return None


class CompletionLogprobWriter:
    """Log-probabilities as completions have them, with as many of the likeliest tokens beside each one as `params` say.
    A writer is for one choice: it counts the characters of its text."""

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams) -> None:
        self._tokenizer = tokenizer
        self._count = params.logprobs
        self._skip = tokenizer.special_ids if params.skip_special_tokens else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0

    def write(self, entries: list[TokenLogprob], text: str, prompt: Scored) -> dict[str, list[Any]]:
        """The next tokens, first those of the `prompt` if it is echoed as `text`. They stand there as far as they were
        written: no special ones that the tokenizer has added, nor its space before the first word."""
        out: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
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


@dataclass(eq=False)
class CompletionWriter(ChunkWriter):
    """Choices as text completions, whole and in chunks. With `echo` the text of a choice begins with its prompt, unless
    the answer holds the prompt's ids (as with vLLM)."""

    objects = "text_completion", "text_completion"

    request: CompletionRequest
    _scores: dict[int, CompletionLogprobWriter] = field(default_factory=dict)

    def opening(self, choice: Choice) -> dict[str, Any] | None:
        # The prompt's log-probabilities come with the first output.
        echoed = self.request.echo and choice.params.logprobs is None
        return self.shown(choice, [], [], chunk=True, ended=False) if echoed else None

    def shown(
        self, choice: Choice, parts: list[Part], logprobs: list[TokenLogprob], *, chunk: bool, ended: bool
    ) -> dict[str, Any]:
        if opens := choice.index not in self._scores:
            self._scores[choice.index] = CompletionLogprobWriter(self.tokenizer, choice.params)
        echo = None
        if opens and self.request.echo:
            prompt = "" if self.request.return_token_ids else self.request.prompt[choice.index // choice.params.n]
            echo = prompt if isinstance(prompt, str) else self.tokenizer.decode(prompt)
        answer: dict[str, Any] = {
            "index": choice.index,
            "text": (echo or "") + "".join(map(str, parts)),  # without a reader all parts are text
            "logprobs": None,
            "finish_reason": choice.finish if ended else None,
            "stop_reason": choice.stop_reason if ended else None,
        }
        if choice.params.logprobs is not None:
            echoed = [] if echo is None else [*zip(choice.prompt, [None, *choice.prompt_logprobs], strict=False)]
            answer["logprobs"] = self._scores[choice.index].write(logprobs, echo or "", echoed)
        if self.request.return_token_ids:
            answer["prompt_token_ids"] = choice.prompt if opens else None
            answer["token_ids"] = choice.take_tokens()
        return answer | prompt_logprobs(self.tokenizer, choice, self.request.prompt_logprobs)
