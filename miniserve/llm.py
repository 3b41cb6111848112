"""The engine in this process: no server, no other processes. `LLM("smollm2-135m").generate("Once upon a time")`."""

import time
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import msgspec
from pydantic import ValidationError
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from miniserve.cluster.messages import Failed, FinishReason, FirstToken, TokenLogprob, TurnOutput
from miniserve.config import ConfigError, EngineConfig, problem
from miniserve.hub.resolve import resolve
from miniserve.kv.hashing import root_hash
from miniserve.sampling_params import ParameterError, SamplingParams, mistyped
from miniserve.text.detokenizer import IncrementalDetokenizer
from miniserve.text.grammar import GrammarError
from miniserve.text.messages import ChatMessage, complaint
from miniserve.text.template import Message
from miniserve.text.tokenizer import Tokenizer
from miniserve.worker.build import build
from miniserve.worker.sequence import Sequence

COMPILING_SECONDS = 0.001
"""How often to look whether a grammar has been compiled, while there is nothing else to do."""

RATE = TextColumn("{task.fields[rate]:.0f} tok/s")
PROGRESS = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), RATE
"""The bar of finished completions."""


class CompletionOutput(msgspec.Struct):
    """One of a prompt's `n` continuations. `stop_reason` is the stop string or stop token that ended it, if one did.
    One whose grammar could not be followed to its end has an `error` that says why, and no `finish_reason`."""

    index: int
    text: str = ""
    token_ids: list[int] = []
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    logprobs: list[TokenLogprob] | None = None
    error: str = ""


class RequestOutput(msgspec.Struct):
    """A prompt and what came of it. `cached_tokens` were found; `prompt_logprobs` begin with the second token."""

    prompt: str
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    cached_tokens: int = 0
    prompt_logprobs: list[TokenLogprob] | None = None


class LLM:
    """A model ready to generate, with the same engine that worker processes run. `model` is a folder, an alias like
    `smollm2-135m`, or a hub id; the other arguments are those of `EngineConfig` (dtype, kv_cache_memory, ...), values
    or written as on the command line ("32k", "2GiB"). Raises `ConfigError`."""

    def __init__(
        self,
        model: str | Path = "smollm2-135m",
        *,
        revision: str | None = None,
        chat_template: str | None = None,
        **engine: Any,
    ) -> None:
        config = _engine_config(str(model), engine)
        files = resolve(config.model, revision=revision, load_format=config.load_format)
        self.tokenizer = Tokenizer.load(files.folder, chat_template)
        self._built = build(msgspec.structs.replace(config, model=str(files.folder)))
        self.engine = self._built.engine
        self._turns = 0

    def generate(
        self,
        prompts: str | list[int] | list[str] | list[list[int]],
        params: SamplingParams | list[SamplingParams] | None = None,
        *,
        progress: bool = True,
        salt: str = "",
    ) -> list[RequestOutput]:
        """Continue each prompt (text, or token ids); one `RequestOutput` each, in order. `params` is one for all or one
        each. Raises `ParameterError` for a prompt or parameter that cannot be honoured, before anything is computed.
        What fails later is the `error` of its own output: the others are as without it."""
        items: Any = [prompts] if isinstance(prompts, str) else prompts
        if not isinstance(items, list | tuple):
            raise ParameterError("prompts", f"`prompts` must be one prompt or a list of them, got {items!r:.100}.")
        if items and isinstance(items[0], int):
            items = [items]
        if not isinstance(params, list):
            params = [SamplingParams() if params is None else params] * len(items)
        if len(params) != len(items):
            raise ParameterError("params", f"{len(items)} prompts came with {len(params)} sampling parameters.")
        generations = []
        for prompt, p in zip(items, params, strict=True):
            tokens = self._tokens(prompt)
            self._check(tokens, p)
            text = prompt if isinstance(prompt, str) else self.tokenizer.decode(tokens, False)
            generations.append(RequestOutput(text, tokens, []))
        self._run(generations, params, progress, salt)
        return generations

    def chat(
        self,
        messages: list[Message] | list[list[Message]],
        params: SamplingParams | list[SamplingParams] | None = None,
        *,
        progress: bool = True,
        salt: str = "",
        **template: Any,
    ) -> list[RequestOutput]:
        """Answer one conversation, or each of several; `template` is as in `Tokenizer.chat`. Raises as `generate`."""
        several = isinstance(messages, list | tuple) and all(isinstance(m, list | tuple) for m in messages)
        conversations: list[Any] = [*messages] if several else [messages]
        prompts = [self.tokenizer.chat(_for_template(conversation), **template) for conversation in conversations]
        return self.generate(prompts, params, progress=progress, salt=salt)

    def _run(self, generations: list[RequestOutput], params: list[SamplingParams], progress: bool, salt: str) -> None:
        root = root_hash(self._built.layout, salt)
        open_turns: dict[str, tuple[RequestOutput, CompletionOutput, IncrementalDetokenizer]] = {}
        for generation, p in zip(generations, params, strict=True):
            for index in range(p.n):
                completion = CompletionOutput(index, logprobs=None if p.logprobs is None else [])
                generation.outputs.append(completion)
                self._turns += 1
                turn = str(self._turns)
                own = p.nth(index)
                seed = time.time_ns() + self._turns if own.seed is None else own.seed
                open_turns[turn] = generation, completion, IncrementalDetokenizer(self.tokenizer, own)
                self.engine.add(Sequence(turn, generation.prompt_token_ids, own, seed, root))
        try:
            with Progress(*PROGRESS, disable=not progress) as bar:
                task, started, count = bar.add_task("Generating", total=len(open_turns), rate=0.0), time.monotonic(), 0
                while open_turns:
                    self.engine.admit()
                    if self.engine.expecting and not self.engine.has_work:
                        time.sleep(COMPILING_SECONDS)
                    for output in self.engine.step().outputs:
                        ended = _take(output, *open_turns[output.turn])
                        if ended:
                            del open_turns[output.turn]
                            self.engine.abort(output.turn)  # it knows nothing of stop strings
                        count += 0 if isinstance(output, Failed) else len(output.tokens)
                        bar.update(task, advance=int(ended), rate=count / (time.monotonic() - started))
        finally:
            for turn in open_turns:  # Ctrl-C in a notebook leaves the engine usable
                self.engine.abort(turn)

    def _tokens(self, prompt: Any) -> list[int]:
        """Token ids of a prompt. Raises `ParameterError` for what is none."""
        if isinstance(prompt, list | tuple) and all(isinstance(token, int) for token in prompt):
            return list(prompt)
        if not isinstance(prompt, str):
            raise ParameterError("prompts", f"A prompt must be text or a list of token ids, got {prompt!r:.100}.")
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise ParameterError("prompts", problem("llm.unicode", start=error.start)) from error
        return self.tokenizer.encode(prompt)

    def _check(self, tokens: list[int], params: SamplingParams) -> None:
        if not isinstance(params, SamplingParams):
            raise ParameterError("params", f"`params` must be SamplingParams or a list of them, got {params!r:.100}.")
        vocab, limit = self._built.model.vocab_size, self.engine.max_model_len
        params.validate(vocab)
        if params.grammar is not None:
            try:
                self._built.grammars.start(params.grammar, []).result()
            except GrammarError as error:
                raise ParameterError("grammar", f"`grammar` cannot be followed: {error}") from error
        if not tokens:
            raise ParameterError("prompts", "A prompt has no tokens.")
        if len(tokens) >= limit:
            raise ParameterError("prompts", problem("llm.long_prompt", tokens=len(tokens), limit=limit))
        if not all(0 <= token < vocab for token in tokens):
            raise ParameterError("prompts", f"A prompt has a token id outside 0 to {vocab - 1}.")


def _take(output: TurnOutput, made: RequestOutput, done: CompletionOutput, words: IncrementalDetokenizer) -> bool:
    """Add one step's output to a completion that is `made`; whether it ends with that."""
    if isinstance(output, Failed):
        done.text += words.flush()
        done.error = output.error
        return True
    text, count = words.feed(output)
    done.text += text
    done.token_ids += output.tokens[:count]
    if done.logprobs is not None:
        done.logprobs += (output.logprobs or [])[:count]
    if done.index == 0 and isinstance(output, FirstToken):
        made.cached_tokens, made.prompt_logprobs = output.cached_tokens, output.prompt_logprobs
    done.finish_reason, done.stop_reason = words.finish, words.stop_reason
    return done.finish_reason is not None


def _engine_config(model: str, settings: dict[str, Any]) -> EngineConfig:
    """What the arguments of `LLM` mean. Raises `ConfigError`."""
    fields = {field.name: field.type for field in msgspec.structs.fields(EngineConfig) if field.name != "model"}
    for name, given in settings.items():
        if name not in fields:
            raise ConfigError(f"LLM has no setting {name!r}. Its settings are {', '.join(fields)}.")
        if isinstance(given, str) and get_origin(fields[name]) is Annotated:  # as on the command line
            settings[name] = get_args(fields[name])[1](given)
    config = EngineConfig(model=model, **settings)
    if problem := mistyped(config):
        raise ConfigError(problem[1])
    return config


def _for_template(conversation: Any) -> list[Message]:
    """A conversation as chat templates know it, the same as the server makes of it. Raises `ParameterError`."""
    if not isinstance(conversation, list | tuple):
        raise ParameterError("messages", problem("llm.messages", given=conversation))
    try:
        return [ChatMessage.model_validate(message).for_template() for message in conversation]
    except ValidationError as error:
        path, reason = complaint(error.errors()[0])
        where = f" (at `{path}`)" if path else ""
        raise ParameterError("messages", f"A message is not understood{where}: {reason}.") from error
