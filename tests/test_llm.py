"""`LLM`: what ends up in a completion, and what callers who get something wrong are told."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from miniserve.api.generation import Choice
from miniserve.cluster.messages import Ended, TokenLogprob, Tokens, TurnOutput
from miniserve.config import ConfigError
from miniserve.llm import LLM, CompletionOutput, RequestOutput, _take
from miniserve.sampling_params import ParameterError, SamplingParams
from miniserve.text.detokenizer import IncrementalDetokenizer
from tests.support.whole import check_pool

EOS, START, END = 317, 318, 319
"""The ids of `tiny.SPECIAL`; the first and the last end a turn."""


@pytest.fixture(scope="module")
def llm(tiny_folder: Path) -> LLM:
    return LLM(tiny_folder, kv_cache_memory="4MiB", threads=1, cpu_kernels="torch")


def run(llm: LLM, prompt: Any = (5, 6, 7), **params: Any) -> list[CompletionOutput]:
    """The completions of one prompt, greedy unless told otherwise."""
    given = SamplingParams(**{"temperature": 0, **params})
    (generation,) = llm.generate(list(prompt), given, progress=False)
    return generation.outputs


def only(token: int) -> dict[str, Any]:
    """Parameters under which greedy text is this token again and again."""
    return {"logit_bias": {token: 100.0}}


@pytest.fixture(autouse=True)
def nothing_is_left(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if "llm" in request.fixturenames:
        llm: LLM = request.getfixturevalue("llm")
        check_pool(llm.engine.pool)
        assert llm.engine.pool.num_held == 0


# --- what ends a turn -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("eos", [EOS, END])
def test_the_end_of_text_is_no_part_of_the_text(llm: LLM, eos: int, skip: bool) -> None:
    (done,) = run(llm, **only(eos), skip_special_tokens=skip)
    assert (done.text, done.finish_reason, done.stop_reason) == ("", "stop", None)
    assert done.token_ids == [eos]


def test_the_end_of_text_is_shown_where_it_is_asked_for(llm: LLM) -> None:
    (done,) = run(llm, **only(END), skip_special_tokens=False, include_stop_str_in_output=True)
    assert (done.text, done.finish_reason, done.stop_reason) == ("<|im_end|>", "stop", None)
    (done,) = run(llm, **only(END), skip_special_tokens=False, ignore_eos=True, max_tokens=2)
    assert (done.text, done.finish_reason, done.stop_reason) == ("<|im_end|>" * 2, "length", None)


@pytest.mark.parametrize("token", [ord("x"), END])
def test_a_stop_token_is_hidden_and_is_the_reason(llm: LLM, token: int) -> None:
    (done,) = run(llm, **only(token), stop_token_ids=[token], skip_special_tokens=False, logprobs=0)
    assert (done.text, done.token_ids, done.finish_reason, done.stop_reason) == ("", [token], "stop", token)
    assert done.logprobs is not None
    assert [entry.token for entry in done.logprobs] == [token]


def test_a_stop_token_is_shown_where_it_is_asked_for(llm: LLM) -> None:
    (done,) = run(llm, **only(ord("x")), stop_token_ids=[ord("x")], include_stop_str_in_output=True)
    assert (done.text, done.stop_reason) == ("x", ord("x"))


@pytest.mark.parametrize("include", [False, True])
def test_one_stop_string_need_not_be_a_list(llm: LLM, include: bool) -> None:
    (done,) = run(llm, **only(ord("N")), stop="NNN", include_stop_str_in_output=include)
    assert (done.text, done.finish_reason, done.stop_reason) == ("NNN" * include, "stop", "NNN")
    assert done.token_ids == [ord("N")] * 3


# Outputs of a turn, parameters: all of this must come out of the library as it does out of the server.
TURNS: list[tuple[list[TurnOutput], dict[str, Any]]] = [
    ([Tokens("t", 0, [*b"One. END. Two"])], {"stop": "END", "logprobs": 0}),
    ([Tokens("t", 0, [*b"One. E"]), Tokens("t", 6, [*b"ND. Two"])], {"stop": ["END"], "logprobs": 0}),
    ([Tokens("t", 0, [*b"END"])], {"stop": "END", "include_stop_str_in_output": True}),
    ([Ended("t", 0, [*b"One. E"], finish="length")], {"stop": "END"}),
    ([Ended("t", 0, [*b"Hi!"], finish="stop", stop_token=33)], {"stop_token_ids": [33]}),
    ([Ended("t", 0, [*b"Hi"], finish="length")], {}),
    ([Tokens("t", 0, [*b"Hi"]), Ended("t", 2, [END], finish="stop", stop_token=END)], {}),
    ([Ended("t", 0, [END], finish="stop", stop_token=END)], {"skip_special_tokens": False}),
    ([Ended("t", 0, [*"é".encode()][:1], finish="length")], {}),
]


@pytest.mark.parametrize(("said", "given"), TURNS)
def test_the_same_tokens_give_what_the_server_gives(llm: LLM, said: list[TurnOutput], given: dict[str, Any]) -> None:
    params = SamplingParams(**given)
    choice = Choice(0, [1], params, llm.tokenizer)
    completion = CompletionOutput(0, logprobs=None if params.logprobs is None else [])
    words = IncrementalDetokenizer(llm.tokenizer, params)
    turn = RequestOutput("", [1], [completion]), completion, words
    for output in said:
        logprobs = [TokenLogprob(token, -0.5, 1, []) for token in output.tokens]
        if params.logprobs is not None:
            output = msgspec.structs.replace(output, logprobs=logprobs)
        choice.feed(output)
        assert _take(output, *turn) is (choice.finish is not None)
    parts, logprobs = choice.take()
    assert (completion.text, completion.logprobs or []) == ("".join(map(str, parts)), logprobs)
    assert (completion.finish_reason, completion.stop_reason) == (choice.finish, choice.stop_reason)
    assert len(completion.token_ids) == choice.output_tokens


# --- choices --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [7, -(2**63), 2**63 - 2])
def test_choices_have_the_seeds_that_the_server_gives_them(llm: LLM, seed: int) -> None:
    params = {"temperature": 2.0, "seed": seed, "ignore_eos": True, "max_tokens": 8}
    together = [done.token_ids for done in run(llm, n=4, **params)]
    apart = [run(llm, **{**params, "seed": SamplingParams(seed=seed).nth(i).seed})[0].token_ids for i in range(4)]
    assert together == apart
    assert len({tuple(ids) for ids in together}) == 4


def test_without_a_seed_choices_differ(llm: LLM) -> None:
    texts = [tuple(done.token_ids) for done in run(llm, n=4, temperature=2.0, ignore_eos=True)]
    assert len(set(texts)) == 4


# --- prompts and messages -------------------------------------------------------------------------------------------


def test_all_forms_of_prompts(llm: LLM) -> None:
    def prompts(given: Any) -> list[tuple[str, list[int]]]:
        done = llm.generate(given, SamplingParams(max_tokens=1), progress=False)
        return [(generation.prompt, generation.prompt_token_ids) for generation in done]

    hi = ("Hi", [*b"Hi"])
    assert prompts("Hi") == prompts([*b"Hi"]) == prompts(tuple(b"Hi")) == [hi]
    assert prompts(["Hi", [*b"Hi"]]) == prompts(("Hi", tuple(b"Hi"))) == [hi, hi]
    assert prompts([]) == []


@pytest.mark.parametrize(
    ("prompts", "says"),
    [
        ([-1], "a token id outside 0 to 319"),
        ([320], "a token id outside 0 to 319"),
        ([2**70], "a token id outside 0 to 319"),
        ([[1], []], "no tokens"),
        ("", "no tokens"),
        ([1] * 512, "maximum context length is 512 tokens"),
        ("\ud800", "half of a surrogate pair"),
        (["a", "b\udc00"], "character 1 is half of a surrogate pair"),
        (5, "one prompt or a list of them, got 5"),
        (None, "got None"),
        ({"prompt": "Hi"}, "a list of them, got {'prompt'"),
        ([{"prompt": "Hi"}], "text or a list of token ids, got {'prompt'"),
        ([1, "a"], "text or a list of token ids"),
        ([1.5], "got 1.5"),
    ],
)
def test_what_is_no_prompt(llm: LLM, prompts: Any, says: str) -> None:
    with pytest.raises(ParameterError, match=says) as raised:
        llm.generate(prompts, progress=False)
    assert raised.value.param == "prompts"


@pytest.mark.parametrize(
    ("params", "name"),
    [
        ({"max_tokens": 2}, "params"),
        ({}, "params"),
        ([{"max_tokens": 2}], "params"),
        ([SamplingParams()] * 2, "params"),
        (SamplingParams(max_tokens="5"), "max_tokens"),  # type: ignore[arg-type]
        ([SamplingParams(stop_token_ids=[320])], "stop_token_ids"),
    ],
)
def test_what_is_no_sampling_parameter(llm: LLM, params: Any, name: str) -> None:
    with pytest.raises(ParameterError) as raised:
        llm.generate("Hi", params, progress=False)
    assert raised.value.param == name


def test_nothing_is_computed_where_one_prompt_is_wrong(llm: LLM) -> None:
    before = llm.engine.counters.steps
    with pytest.raises(ParameterError):
        llm.generate([[1], [2], [-1]], progress=False)
    assert (llm.engine.counters.steps, list(llm.engine.waiting)) == (before, [])


def test_one_conversation_or_several(llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=2)
    hello, bye = ([{"role": "user", "content": text}] for text in ("Hello", "Bye"))
    (one,) = llm.chat(hello, params, progress=False)
    assert one.prompt == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    both = llm.chat([hello, bye], params, progress=False)
    assert [both[0].prompt, both[0].outputs] == [one.prompt, one.outputs]
    assert "Bye" in both[1].prompt


def test_messages_are_what_the_server_takes(llm: LLM) -> None:
    parts = [{"type": "text", "text": "Hello"}, {"type": "text", "text": "you"}]
    messages = [{"role": "developer", "content": "Rhyme."}, {"role": "user", "content": parts}]
    (done,) = llm.chat(messages, SamplingParams(max_tokens=1), progress=False, add_generation_prompt=False)
    assert done.prompt == "<|im_start|>system\nRhyme.<|im_end|>\n<|im_start|>user\nHello\nyou<|im_end|>\n"


@pytest.mark.parametrize(
    ("messages", "says"),
    [
        ("Hi", "a list of messages"),
        ({"role": "user", "content": "Hi"}, "a list of messages"),
        (None, "a list of messages"),
        (["Hi"], "not understood"),
        ([[]], "at least one message"),
        ([{"content": "Hi"}], "at `role`"),
        ([{"role": "robot", "content": "Hi"}], "at `role`"),
        ([{"role": "user"}], "needs `content`"),
        ([{"role": "user", "content": 5}], "at `content`.*a string or a list of text parts"),
        ([{"role": "user", "content": [{"type": "nonsense"}]}], r"at `content\[0\]`.*text only"),
        ([{"role": "user", "content": "\ud800"}], "surrogate pair"),
    ],
)
def test_what_is_no_conversation(llm: LLM, messages: Any, says: str) -> None:
    with pytest.raises(ParameterError, match=says) as raised:
        llm.chat(messages, progress=False)
    assert raised.value.param == "messages"


# --- settings -------------------------------------------------------------------------------------------------------


def test_sizes_are_written_as_on_the_command_line(llm: LLM) -> None:
    pool = llm.engine.pool.num_pages * llm._built.memory.shape.bytes
    assert 2**21 < pool <= 2**22


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"kv_cache_memory": "lots"}, "write it like 2GiB"),
        ({"kv_cache_memory": 2**21 + 0.5}, "`kv_cache_memory` must be int"),
        ({"max_model_len": "long"}, "'long' is not a number of tokens"),
        ({"max_model_len": [64]}, "`max_model_len` must be int"),
        ({"dtype": None}, "`dtype` must be one of auto"),
        ({"dtype": "float8"}, "`dtype` must be one of auto, bfloat16, .*got 'float8'"),
        ({"max_len": 64}, "no setting 'max_len'.*max_model_len"),
    ],
)
def test_what_is_no_setting_is_told_before_a_model_is_looked_for(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        LLM("no-such-model", **settings)


def test_a_model_that_is_not_there() -> None:
    with pytest.raises(ConfigError, match="There is no model 'no-such-model'"):
        LLM("no-such-model")
