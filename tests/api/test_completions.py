"""/v1/completions over a fake engine: prompts, streams, log-probabilities, token ids."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer as Backend

from miniserve.api.openai.completions import CompletionLogprobWriter
from miniserve.cluster.messages import TokenLogprob
from miniserve.sampling_params import SamplingParams
from miniserve.text.tokenizer import Tokenizer
from tests.support.api import HI, Api, deltas, error_of, events, make_app
from tests.support.fake_engine import EOS, FakeClient, spell


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


# --- log-probabilities of prompts -----------------------------------------------------------------------------------


def joined(logprobs: list[dict[str, list[Any]]]) -> dict[str, list[Any]]:
    return {key: [value for part in logprobs for value in part[key]] for key in logprobs[0]}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("max_tokens", [9, 0])
async def test_an_echo_with_logprobs(api: Api, stream: bool, max_tokens: int) -> None:
    """They cover the prompt and what comes after it; every choice begins with the prompt."""
    response = await api.complete(echo=True, logprobs=1, n=2, stream=stream, max_tokens=max_tokens)
    parts = [c for part in (events(response) if stream else [response.json()]) for c in part["choices"]]
    generated = list("Hello")[:max_tokens]
    for index in (0, 1):
        own = [part for part in parts if part["index"] == index]
        assert "".join(part["text"] for part in own) == "Hi" + "".join(generated)
        assert own[-1]["finish_reason"] == ("stop" if max_tokens else "length")
        found = joined([part["logprobs"] for part in own])
        if max_tokens:  # the end of text, which is no part of the text
            assert [values.pop() for values in found.values()] == ["<|eos_token|>", -0.5, {"<|eos_token|>": -0.5}, 7]
        assert found == {
            "tokens": ["H", "i", *generated],
            "token_logprobs": [None, -2.0, *[-0.5] * len(generated)],
            "top_logprobs": [None, {"i": -2.0}, *({letter: -0.5} for letter in generated)],
            "text_offset": list(range(2 + len(generated))),
        }
    assert own[0]["text"].startswith("Hi"), "all of the prompt comes in the first chunk"
    assert [turn.params.prompt_logprobs for turn in api.engine.turns] == [1, None]


async def test_an_echo_alone_wants_no_logprobs(api: Api) -> None:
    answer = (await api.complete(echo=True, max_tokens=0)).json()
    assert [(c["text"], c["logprobs"], c["finish_reason"]) for c in answer["choices"]] == [("Hi", None, "length")]
    assert answer["usage"]["completion_tokens"] == 0
    assert api.engine.turns[0].params.prompt_logprobs is None
    answer = (await api.complete(max_tokens=0, logprobs=1)).json()
    assert [(c["text"], c["logprobs"]["tokens"]) for c in answer["choices"]] == [("", [])]


@pytest.mark.parametrize("route", ["chat", "complete"])
async def test_prompt_logprobs(api: Api, route: str) -> None:
    """vLLM's shape: by token id, with the rank, for all tokens of the prompt but the first."""
    body = {"messages": HI} if route == "chat" else {"prompt": ["Hi", "you"]}
    answer = (await getattr(api, route)(**body, prompt_logprobs=2)).json()
    found = [answer] if route == "chat" else answer["choices"]
    for place, turn in zip(found, api.engine.turns, strict=True):
        assert place["prompt_logprobs"][0] is None
        assert place["prompt_logprobs"][1:] == [
            {
                str(token): {"logprob": -2.0, "rank": 1, "decoded_token": chr(token)},
                str(token + 1): {"logprob": -3.0, "rank": 2, "decoded_token": chr(token + 1)},
            }
            for token in turn.tokens[1:]
        ]
    assert "prompt_logprobs" not in str((await getattr(api, route)(**body)).json())


async def test_both_kinds_of_prompt_logprobs_have_their_own_count(api: Api) -> None:
    (choice,) = (await api.complete(echo=True, logprobs=1, prompt_logprobs=3, max_tokens=1)).json()["choices"]
    assert [len(tops) for tops in choice["logprobs"]["top_logprobs"][1:]] == [1, 1]
    assert len(choice["prompt_logprobs"][1]) == 3
    (choice,) = (await api.complete(echo=True, logprobs=3, prompt_logprobs=1, max_tokens=1)).json()["choices"]
    assert [len(tops) for tops in choice["logprobs"]["top_logprobs"][1:]] == [3, 3]
    assert len(choice["prompt_logprobs"][1]) == 1


@pytest.mark.parametrize(
    ("text", "tokens", "offsets"),
    [
        ("héy", ["h", 0xC3, 0xA9, "y"], [0, 1, 1, 2]),
        ("<|im_start|>a", ["<|im_start|>", "a"], [0, 12]),  # written in the prompt
        ("a<|im_end|>", ["<|endoftext|>", "a", "<|im_end|>"], [0, 0, 1]),  # added by the tokenizer
        ("the the", [" the", " the"], [0, 3]),  # a space that the tokenizer has added
        ("", ["a", " the"], [0, 0]),
    ],
)
def test_offsets_of_a_prompt(tiny_folder: Any, text: str, tokens: list[Any], offsets: list[int]) -> None:
    tokenizer = Tokenizer.load(tiny_folder)
    ids = [token if isinstance(token, int) else tokenizer.encode(token)[0] for token in tokens]
    writer = CompletionLogprobWriter(tokenizer, SamplingParams(logprobs=0))
    entries = [TokenLogprob(token, -1.0, 1, []) for token in [*ids, ord("z"), ord("z")]]
    prompt = [(ids[0], None), *((token, entry) for token, entry in zip(ids[1:], entries[1:], strict=False))]
    out = writer.write(entries[len(ids) :], text, prompt)
    assert out["text_offset"] == [*offsets, len(text), len(text) + 1]
    assert out["top_logprobs"][0] is out["token_logprobs"][0] is None


# --- filling a gap --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "tokens",
    [
        ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"],
        ["<fim_prefix>", "<fim_suffix>", "<fim_middle>"],
        ["<\uff5cfim\u2581begin\uff5c>", "<\uff5cfim\u2581hole\uff5c>", "<\uff5cfim\u2581end\uff5c>"],
    ],
)
async def test_a_suffix_fills_in_the_middle(tiny_folder: Any, tmp_path: Any, tokens: list[str]) -> None:
    plain = Tokenizer.load(tiny_folder)
    backend = Backend.from_file(str(tiny_folder / "tokenizer.json"))
    backend.add_tokens(tokens)
    engine = FakeClient(steps=[*spell("b")], finish="length")
    api = Api(make_app(Tokenizer(backend, tmp_path, {}), engine), engine)
    answer = (await api.complete(prompt="a(", suffix=") c", n=2)).json()
    assert [choice["text"] for choice in answer["choices"]] == ["b", "b"]
    before, gap, after = map(backend.token_to_id, tokens)
    assert engine.turns[0].tokens == [before, *plain.encode("a("), gap, *plain.encode(") c"), after]


async def test_a_suffix_needs_a_model_that_knows_it(api: Api) -> None:
    error = error_of(await api.complete(suffix="x"), 400)
    assert error["param"] == "suffix"
    assert "no tokens to fill in the middle" in error["message"]


async def test_the_fingerprint_is_of_the_server(api: Api) -> None:
    """The same in all answers and chunks, whichever name of the model was asked for."""
    found = set()
    for ask in (api.chat, api.complete):
        found.add((await ask(model="alias")).json()["system_fingerprint"])
        found |= {chunk["system_fingerprint"] for chunk in events(await ask(stream=True))}
    (fingerprint,) = found
    assert fingerprint.startswith("fp_")
