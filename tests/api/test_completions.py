"""/v1/completions over a fake engine: prompts, streams, log-probabilities, token ids."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.api import Api, deltas, events
from tests.support.fake_engine import EOS, spell


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("Hi", [b"Hi"]),
        (["a", "b"], [b"a", b"b"]),
        ([72, 105], [b"Hi"]),
        ([[97], [98, 99]], [b"a", b"bc"]),
        (["a", [98]], [b"a", b"b"]),
    ],
)
async def test_prompts(api: Api, prompt: Any, expected: list[bytes]) -> None:
    answer = (await api.complete(prompt=prompt, n=2, echo=True, max_tokens=4)).json()
    firsts = api.engine.turns[: len(expected)]
    assert [bytes(turn.tokens) for turn in firsts] == expected
    assert [c["index"] for c in answer["choices"]] == list(range(2 * len(expected)))
    texts = [prompt.decode() + "Hell" for prompt in expected for _ in range(2)]
    assert [c["text"] for c in answer["choices"]] == texts
    assert {c["finish_reason"] for c in answer["choices"]} == {"length"}
    assert answer["usage"]["prompt_tokens"] == sum(map(len, expected))
    assert answer["usage"]["completion_tokens"] == 8 * len(expected)


async def test_completion_stream(api: Api) -> None:
    chunks = events(await api.complete(stream=True, echo=True))
    assert [c["object"] for c in chunks] == ["text_completion"] * len(chunks)
    assert chunks[0]["choices"] == [
        {"index": 0, "text": "Hi", "logprobs": None, "finish_reason": None, "stop_reason": None}
    ]
    assert deltas(chunks) == "HiHello"
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
    assert api.engine.turns[0].params.max_tokens == 16


@pytest.mark.parametrize("stream", [False, True])
async def test_completion_logprobs(api: Api, stream: bool) -> None:
    api.engine.play = lambda tokens, params: {"steps": spell("héy"), "pause": 0.001, "finish": "length"}
    response = await api.complete(logprobs=1, stream=stream)
    parts = events(response) if stream else [response.json()]
    found = [part["choices"][0]["logprobs"] for part in parts]
    joined = {key: [value for logprobs in found for value in logprobs[key]] for key in found[0]}
    assert joined == {
        "tokens": ["h", "bytes:\\xc3", "bytes:\\xa9", "y"],
        "token_logprobs": [-0.5] * 4,
        "top_logprobs": [{"h": -0.5}, {"bytes:\\xc3": -0.5}, {"bytes:\\xa9": -0.5}, {"y": -0.5}],
        "text_offset": [0, 1, 1, 2],
    }
    assert api.engine.turns[0].params.logprobs == 1


@pytest.mark.parametrize("echo", [False, True])
async def test_completions_hold_token_ids(api: Api, echo: bool) -> None:
    """As vLLM does: all of them, the one that ended it too; the prompt's ids take the place of its echo."""
    answer = (await api.complete(return_token_ids=True, echo=echo, n=2)).json()
    for choice in answer["choices"]:
        assert choice["prompt_token_ids"] == list(b"Hi")
        assert choice["token_ids"] == [*b"Hello", EOS]
        assert choice["text"] == "Hello"
    assert not (await api.complete()).json()["choices"][0].keys() & {"prompt_token_ids", "token_ids"}


@pytest.mark.parametrize("echo", [False, True])
async def test_a_stream_has_a_chunk_for_every_token(api: Api, echo: bool) -> None:
    """Those that are no whole character, or perhaps the beginning of a stop string, have no text yet."""
    steps = [[195], [169], *spell("ab"), [EOS]]
    api.engine.play = lambda tokens, params: {"steps": steps, "stop_token": EOS, "pause": 0.005}
    response = await api.complete(stream=True, return_token_ids=True, echo=echo, n=2, stop=["bc"])
    chunks = [chunk["choices"][0] for chunk in events(response)]
    for index in (0, 1):
        own = [chunk for chunk in chunks if chunk["index"] == index]
        assert [c["prompt_token_ids"] for c in own] == [list(b"Hi")] + [None] * (len(own) - 1)
        pieces = [(c["token_ids"], c["text"]) for c in own[echo:]]
        assert pieces == [([195], ""), ([169], "é"), ([97], "a"), ([98], ""), ([EOS], "b"), ([], "")]
        assert [c["finish_reason"] for c in own[echo:]] == [None] * 5 + ["stop"]
    plain = events(await api.complete(stream=True, stop=["bc"]))
    assert [c["choices"][0]["text"] for c in plain] == ["é", "a", "b", ""]
    assert not any(c["choices"][0].keys() & {"prompt_token_ids", "token_ids"} for c in plain)
