"""/v1/chat/completions over a fake engine: answers, streams, stops, choices, log-probabilities, token ids."""

from __future__ import annotations

import json
from typing import Any

import pytest

from miniserve.api.generation import AnswerHead, Generation
from miniserve.api.openai.chat import ChatWriter
from miniserve.api.openai.schemas import ChatRequest
from miniserve.monitor.metrics import Metrics
from miniserve.sampling_params import SamplingParams
from miniserve.scheduler.scheduler import QueueFull
from miniserve.text.tokenizer import Tokenizer
from tests.support.api import HI, PROMPT, Api, deltas, error_of, events
from tests.support.fake_engine import EOS, FakeClient, spell


async def test_chat(api: Api) -> None:
    response = await api.http.post(
        "/v1/chat/completions", json={"messages": HI, "model": "alias"}, headers={"X-Request-Id": "abc"}
    )
    assert response.headers["x-request-id"] == "abc"
    answer = response.json()
    assert answer.pop("created") > 0
    assert answer.pop("system_fingerprint").startswith("fp_")
    assert answer == {
        "id": "chatcmpl-abc",
        "object": "chat.completion",
        "model": "alias",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Hello", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
                "stop_reason": None,
            }
        ],
        "usage": {
            "prompt_tokens": len(PROMPT),
            "completion_tokens": 6,
            "total_tokens": len(PROMPT) + 6,
            "prompt_tokens_details": {"cached_tokens": 16},
        },
    }
    (turn,) = api.engine.turns
    assert turn.tokens == PROMPT
    assert turn.params.max_tokens == 512 - len(PROMPT)
    assert not turn.cancelled.is_set()


async def test_stream_is_exact(api: Api) -> None:
    chunks = events(await api.chat(stream=True, stream_options={"include_usage": True}))
    assert len({(c["id"], c["object"], c["created"], c["model"]) for c in chunks}) == 1
    assert chunks[0]["object"] == "chat.completion.chunk"
    *choices, last = [c["choices"] for c in chunks]
    assert last == []
    assert choices[0] == [
        {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
    ]
    assert all(c[0]["delta"].keys() == {"content"} and c[0]["finish_reason"] is None for c in choices[1:-1])
    assert choices[-1] == [{"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop", "stop_reason": None}]
    assert deltas(chunks) == "Hello"
    assert [c["usage"] for c in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1]["usage"]["total_tokens"] == len(PROMPT) + 6
    assert chunks[-1]["usage"]["prompt_tokens_details"] == {"cached_tokens": 16}


async def test_stream_without_usage(api: Api) -> None:
    chunks = events(await api.chat(stream=True))
    assert all("usage" not in chunk and chunk["choices"] for chunk in chunks)


async def test_stream_with_continuous_usage(api: Api) -> None:
    api.engine.play = lambda tokens, params: {"steps": spell("abc"), "pause": 0.01, "cached": 16}
    options = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, last = events(await api.chat(stream=True, n=2, stream_options=options))
    for index in range(2):
        usages = [c["usage"] for c in chunks if c["choices"][0]["index"] == index]
        assert [u["completion_tokens"] for u in usages] == [0, 1, 2, 3, 3]
        assert {u["prompt_tokens"] for u in usages} == {len(PROMPT)}
        assert usages[-1]["total_tokens"] == len(PROMPT) + 3
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 6
    chunks = events(await api.complete(stream=True, max_tokens=2, echo=True, stream_options=options))
    assert [c["usage"]["completion_tokens"] for c in chunks] == [0, 1, 2, 2, 2]
    for ignored in ({"continuous_usage_stats": True}, {"include_usage": False, "continuous_usage_stats": True}):
        chunks = events(await api.chat(stream=True, stream_options=ignored))
        assert all("usage" not in chunk and chunk["choices"] for chunk in chunks)


@pytest.mark.parametrize("stream", [False, True])
async def test_stop_string_across_tokens(api: Api, stream: bool) -> None:
    api.engine.play = lambda tokens, params: {"steps": spell("One. END. Two"), "pause": 0.001}
    response = await api.chat(
        stop=["never", "END"], stream=stream, stream_options={"include_usage": True} if stream else None
    )
    if stream:
        chunks = events(response)
        assert deltas(chunks) == "One. "
        choice, usage = chunks[-2]["choices"][0], chunks[-1]["usage"]
    else:
        choice, usage = response.json()["choices"][0], response.json()["usage"]
        assert choice["message"]["content"] == "One. "
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", "END")
    assert usage["completion_tokens"] == 8
    assert api.engine.turns[0].cancelled.is_set()


async def test_stop_string_within_one_output(api: Api) -> None:
    api.engine.play = lambda tokens, params: {"steps": [list(b"One. END. Two")]}
    answer = (await api.chat(stop="END", include_stop_str_in_output=True, logprobs=True)).json()
    assert answer["choices"][0]["message"]["content"] == "One. END"
    assert answer["usage"]["completion_tokens"] == 8 == len(answer["choices"][0]["logprobs"]["content"])


async def test_stop_tokens_are_hidden_unless_asked_for(api: Api) -> None:
    api.engine.play = lambda tokens, params: {"steps": spell("Hi!"), "stop_token": ord("!")}
    choice = (await api.chat(stop_token_ids=[33])).json()["choices"][0]
    assert (choice["message"]["content"], choice["stop_reason"]) == ("Hi", 33)
    choice = (await api.chat(stop_token_ids=[33], include_stop_str_in_output=True)).json()["choices"][0]
    assert (choice["message"]["content"], choice["stop_reason"]) == ("Hi!", 33)


async def test_characters_are_never_split(api: Api) -> None:
    text = "naïve 😀 日本"
    api.engine.play = lambda tokens, params: {"steps": spell(text), "pause": 0.001}
    chunks = events(await api.chat(stream=True))
    assert deltas(chunks) == text
    assert "\ufffd" not in json.dumps(chunks, ensure_ascii=False)
    api.engine.play = lambda tokens, params: {"steps": spell("é")[:1], "finish": "length"}
    chunks = events(await api.chat(stream=True))
    assert deltas(chunks) == "\ufffd"
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"


async def test_waiting_tokens_share_a_chunk(api: Api) -> None:
    api.engine.play = lambda tokens, params: {"steps": spell("x" * 300)}
    chunks = events(await api.chat(stream=True))
    assert deltas(chunks) == "x" * 300
    assert len(chunks) < 20


# --- choices --------------------------------------------------------------------------------------------------------


async def test_choices_follow_the_first_token(api: Api) -> None:
    waiting = []

    def play(tokens: list[int], params: Any) -> dict[str, Any]:
        waiting.append([turn.given for turn in api.engine.turns])
        return {"steps": spell("abc"[len(waiting) - 1] * 3), "pause": 0.005, "cached": 16 * (len(waiting) > 1)}

    api.engine.play = play
    chunks = events(await api.chat(stream=True, n=3, seed=2**63 - 1, stream_options={"include_usage": True}))
    assert waiting[0] == []
    assert waiting[1][0] > 0
    assert [turn.params.seed for turn in api.engine.turns] == [2**63 - 1, -(2**63), -(2**63) + 1]
    assert [c["choices"][0]["index"] for c in chunks[:3]] == [0, 1, 2]
    assert [deltas(chunks, i) for i in range(3)] == ["aaa", "bbb", "ccc"]
    order = [c["choices"][0]["index"] for c in chunks[3:-1]]
    assert order != sorted(order), "the choices' streams are interleaved"
    assert chunks[-1]["usage"]["completion_tokens"] == 9
    assert chunks[-1]["usage"]["prompt_tokens"] == len(PROMPT)
    assert chunks[-1]["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


async def test_choices_without_a_stream(api: Api) -> None:
    answer = (await api.chat(n=3)).json()
    assert [c["index"] for c in answer["choices"]] == [0, 1, 2]
    assert {c["message"]["content"] for c in answer["choices"]} == {"Hello"}
    assert [turn.params.seed for turn in api.engine.turns] == [None] * 3


async def test_choices_that_end_with_their_first_output(api: Api) -> None:
    api.engine.play = lambda tokens, params: {"steps": [[]], "finish": "length"}
    answer = (await api.chat(n=2)).json()
    assert [c["message"]["content"] for c in answer["choices"]] == ["", ""]


async def test_a_refused_choice_ends_the_others(api: Api) -> None:
    def play(tokens: list[int], params: Any) -> dict[str, Any]:
        if api.engine.turns:
            raise QueueFull("Full.", 3)
        return {"steps": spell("abc"), "pause": 0.01}

    api.engine.play = play
    response = await api.chat(n=2)
    assert error_of(response, 503)["code"] == "queue_full"
    assert api.engine.turns[0].cancelled.is_set()


# --- log-probabilities and token ids ----------------------------------------------------------------------------------


@pytest.mark.parametrize("stream", [False, True])
async def test_chat_logprobs(api: Api, stream: bool) -> None:
    api.engine.play = lambda tokens, params: {"steps": spell("hé"), "pause": 0.001, "finish": "length"}
    response = await api.chat(logprobs=True, top_logprobs=2, stream=stream)
    if stream:
        found = [c["choices"][0]["logprobs"] for c in events(response)]
        content = [entry for logprobs in found if logprobs for entry in logprobs["content"]]
    else:
        content = response.json()["choices"][0]["logprobs"]["content"]
    assert [entry["bytes"] for entry in content] == [[0x68], [0xC3], [0xA9]]
    assert content[0]["top_logprobs"] == [
        {"token": "h", "bytes": [0x68], "logprob": -0.5},
        {"token": "i", "bytes": [0x69], "logprob": -1.5},
    ]


async def test_no_logprobs_unless_asked(api: Api) -> None:
    assert (await api.chat(logprobs=False)).json()["choices"][0]["logprobs"] is None
    assert api.engine.turns[0].params.logprobs is None
    await api.chat(logprobs=True)
    assert api.engine.turns[1].params.logprobs == 0


@pytest.mark.parametrize("wanted", [True, False])
async def test_chats_hold_token_ids(tokenizer: Tokenizer, wanted: bool) -> None:
    """The prompt's ids are beside the choices there: once, and in the chunk that says who speaks."""

    def begin() -> Generation:
        engine = FakeClient(steps=[[195], [169], [EOS]], stop_token=EOS, pause=0.005)
        prompts = [([1, 2, 3], SamplingParams(max_tokens=9))]
        metrics = Metrics(engine, "tiny")  # type: ignore[arg-type]
        generation = Generation(prompts, lambda p, params, _: engine.submit(p, params), tokenizer, metrics, 0.0)  # type: ignore[arg-type, return-value]
        generation.start()
        return generation

    request = ChatRequest.model_validate({"messages": HI, "return_token_ids": wanted})
    writer = ChatWriter(AnswerHead("x", 1, "tiny", "fp_1"), tokenizer, request)
    async with begin() as generation:
        await generation.finish()
        whole = writer.response(generation)
    async with begin() as generation:
        data = b"".join([piece async for piece in writer.stream(generation)])
    chunks = [json.loads(line[6:]) for line in data.decode().split("\n\n")[:-2]]
    choices = [chunk["choices"][0] for chunk in chunks]
    if wanted:
        assert whole["prompt_token_ids"] == chunks[0]["prompt_token_ids"] == [1, 2, 3]
        assert whole["choices"][0]["token_ids"] == [195, 169, EOS]
        assert not any("prompt_token_ids" in chunk for chunk in chunks[1:])
        assert "token_ids" not in choices[0]
        pieces = [(c["token_ids"], c["delta"]) for c in choices[1:]]
        assert pieces == [([195], {"content": ""}), ([169], {"content": "é"}), ([EOS], {"content": ""}), ([], {})]
    else:
        assert [c["delta"] for c in choices[1:]] == [{"content": "é"}, {}]
        assert "token_ids" not in data.decode()
        assert "token_ids" not in json.dumps(whole)
