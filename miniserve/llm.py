"""The engine in this process: no server, no other processes. `LLM("smollm2-135m").generate("Once upon a time")`."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from miniserve.cluster.messages import FinishReason, TokenLogprob, TurnOutput
from miniserve.config import EngineConfig
from miniserve.hub import resolve
from miniserve.kv.hashing import root_hash
from miniserve.sampling import ParameterError, SamplingParams
from miniserve.stream import TextStream
from miniserve.tokenizer import Tokenizer
from miniserve.worker.build import build
from miniserve.worker.sequence import Sequence


class Completion(msgspec.Struct):
    """One of a prompt's `n` continuations. `stop_reason` is the stop string or stop token that ended it, if one did."""

    index: int
    text: str = ""
    token_ids: list[int] = []
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    logprobs: list[TokenLogprob] | None = None


class Generation(msgspec.Struct):
    """A prompt and what came of it. `cached_tokens` of the prompt were found in the prefix cache."""

    prompt: str
    prompt_token_ids: list[int]
    outputs: list[Completion]
    cached_tokens: int = 0


class LLM:
    """A model ready to generate, with the same engine that worker processes run.

    `model` is a folder, an alias like `smollm2-135m`, or a hub id; the other arguments are those of `EngineConfig`
    (dtype, max_model_len, kv_cache_memory in bytes, max_num_batched_tokens, ...). Raises `ModelError` or `ConfigError`.
    """

    def __init__(
        self,
        model: str = "smollm2-135m",
        *,
        revision: str | None = None,
        chat_template: str | None = None,
        **engine: Any,
    ) -> None:
        files = resolve(model, revision=revision, load_format=engine.get("load_format", "auto"))
        self.tokenizer = Tokenizer.load(files.folder, chat_template)
        self._built = build(EngineConfig(model=str(files.folder), **engine))
        self.engine = self._built.engine
        self._turns = 0

    def generate(
        self,
        prompts: str | list[int] | list[str] | list[list[int]],
        params: SamplingParams | list[SamplingParams] | None = None,
        *,
        progress: bool = True,
        salt: str = "",
    ) -> list[Generation]:
        """Continue each prompt (text, or token ids); one `Generation` each, in order.

        `params` is one for all or one each. Raises `ParameterError` for a prompt or parameter that cannot be honoured,
        before anything is computed.
        """
        if isinstance(prompts, str):
            items: list[str | list[int]] = [prompts]
        elif prompts and isinstance(prompts[0], int):
            items = [prompts]
        else:
            items = list(prompts)  # type: ignore[arg-type]
        if not isinstance(params, list):
            params = [params or SamplingParams()] * len(items)
        if len(params) != len(items):
            raise ParameterError("params", f"{len(items)} prompts came with {len(params)} sampling parameters.")
        tokens = [self.tokenizer.encode(p) if isinstance(p, str) else p for p in items]
        texts = [p if isinstance(p, str) else self.tokenizer.decode(p, False) for p in items]
        return self._run(texts, tokens, params, progress, salt)

    def chat(
        self,
        messages: list[dict[str, Any]] | list[list[dict[str, Any]]],
        params: SamplingParams | list[SamplingParams] | None = None,
        *,
        progress: bool = True,
        salt: str = "",
        **template: Any,
    ) -> list[Generation]:
        """Answer one conversation, or each of several, through the model's chat template; see `Tokenizer.chat` for
        `template`. Raises as `generate` does."""
        conversations: list[Any] = [messages] if messages and isinstance(messages[0], dict) else list(messages)
        return self.generate(
            [self.tokenizer.chat(conversation, **template) for conversation in conversations],
            params,
            progress=progress,
            salt=salt,
        )

    def _run(
        self, texts: list[str], prompts: list[list[int]], params: list[SamplingParams], progress: bool, salt: str
    ) -> list[Generation]:
        for tokens, p in zip(prompts, params, strict=True):
            self._check(tokens, p)
        root = root_hash(self._built.layout, salt)
        generations = []
        open_choices: dict[str, tuple[Generation, Completion, TextStream]] = {}
        for text, tokens, p in zip(texts, prompts, params, strict=True):
            generation = Generation(text, tokens, [])
            generations.append(generation)
            for index in range(p.n):
                completion = Completion(index, logprobs=None if p.logprobs is None else [])
                generation.outputs.append(completion)
                stream = TextStream(
                    self.tokenizer, p.stop, p.skip_special_tokens, p.include_stop_str_in_output, p.min_tokens
                )
                self._turns += 1
                turn = str(self._turns)
                seed = time.time_ns() + self._turns if p.seed is None else p.seed + index
                open_choices[turn] = (generation, completion, stream)
                self.engine.add(Sequence(turn, tokens, p, seed, root))
        try:
            with _progress_bar(progress, len(open_choices)) as advance:
                while open_choices:
                    self.engine.admit()
                    for output in self.engine.step().outputs:
                        generation, completion, stream = open_choices[output.turn]
                        self._take(output, generation, completion, stream)
                        if completion.finish_reason:
                            del open_choices[output.turn]
                        advance(len(output.tokens), bool(completion.finish_reason))
        finally:
            for turn in open_choices:  # Ctrl-C in a notebook leaves the engine usable
                self.engine.abort(turn)
        return generations

    def _take(self, output: TurnOutput, generation: Generation, completion: Completion, stream: TextStream) -> None:
        """Add one step's output to its completion; a stop string ends the turn."""
        completion.token_ids += output.tokens
        if completion.logprobs is not None:
            completion.logprobs += output.logprobs or []
        if completion.index == 0 and output.cached_tokens is not None:
            generation.cached_tokens = output.cached_tokens
        completion.text += stream.push(output.tokens)
        completion.finish_reason, completion.stop_reason = output.finish, output.stop_token
        if output.finish and not stream.stopped_by:
            completion.text += stream.flush()
        if stream.stopped_by:
            self.engine.abort(output.turn)
            completion.finish_reason, completion.stop_reason = "stop", stream.stopped_by

    def _check(self, tokens: list[int], params: SamplingParams) -> None:
        vocab, limit = self._built.model.vocab_size, self.engine.max_model_len
        params.validate(vocab)
        if not tokens:
            raise ParameterError("prompts", "A prompt has no tokens.")
        if len(tokens) >= limit:
            raise ParameterError(
                "prompts", f"A prompt has {len(tokens)} tokens, but the maximum context length is {limit} tokens."
            )
        if not all(0 <= token < vocab for token in tokens):
            raise ParameterError("prompts", f"A prompt has a token id outside 0 to {vocab - 1}.")


@contextlib.contextmanager
def _progress_bar(show: bool, total: int) -> Iterator[Callable[[int, bool], None]]:
    """A bar of finished completions with the rate of tokens; gives a function that takes (new tokens, finished)."""
    if not show:
        yield lambda tokens, finished: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[rate]:.0f} tok/s"),
    )
    started, count = time.monotonic(), 0
    with Progress(*columns, transient=False) as bar:
        task = bar.add_task("Generating", total=total, rate=0.0)

        def advance(tokens: int, finished: bool) -> None:
            nonlocal count
            count += tokens
            bar.update(task, advance=int(finished), rate=count / (time.monotonic() - started))

        yield advance
