"""Reasoning is separated from the answer however the text comes, and over the API."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from miniserve.text.dialect import find_dialect
from miniserve.text.formats import FORMATS, REASONING_MARKS, ReasoningMarks
from miniserve.text.grammar import Compiler
from miniserve.text.reader import CallScanner, Part, Reader, Reasoning, ToolCall, merged
from miniserve.text.tokenizer import Tokenizer
from tests.support import dialects
from tests.support.dialects import TOOLS, called
from tests.support.servers import ChatServer as Api

QWEN = REASONING_MARKS["qwen3"]
CALL = '<tool_call>\n{"name": "list_all", "arguments": {}}\n</tool_call>'
OPENS = dialects.TEMPLATES["hermes"].replace(
    "assistant\\n' }}{% endif %}",
    "assistant\\n' }}{{ '<think>\\n\\n</think>\\n\\n' if enable_thinking is false else '<think>\\n' }}{% endif %}",
)
"""A template that begins the reasoning in the prompt, or ends it there."""


def read(pieces: list[str], marks: ReasoningMarks = QWEN, opened: bool = False, tools: bool = True) -> list[Any]:
    reader = Reader(marks, opened, CallScanner(FORMATS["hermes"], {}, False) if tools else None)
    parts: list[Part] = [part for piece in pieces for part in reader.read(piece)]
    parts += reader.read("", final=True)
    return [part.name if isinstance(part, ToolCall) else part for part in merged(parts)]


R = Reasoning


@pytest.mark.parametrize(
    ("text", "opened", "parts"),
    [
        ("<think>\nHm.\n\nYes.\n</think>\n\nParis.\n", False, [R("Hm.\n\nYes."), "Paris.\n"]),
        ("\n<think>Hm</think>Paris", False, [R("Hm"), "Paris"]),
        ("<think>\n\n</think>\n\nParis", False, ["Paris"]),
        ("<think>\nHm.\n</think>\n\n" + CALL, False, [R("Hm."), "list_all"]),
        (f"<think>\nHm {CALL}\n</think>\nSo: {CALL}", False, [R(f"Hm {CALL}"), "So:", "list_all"]),
        ("Paris <think>not</think>", False, ["Paris <think>not</think>"]),
        ("  Paris", False, ["  Paris"]),
        ("<thi", False, ["<thi"]),
        ("<thing>", False, ["<thing>"]),
        ("<think>\nHm </thi", False, [R("Hm </thi")]),
        ("<think>\nHm <b> </b> </thin>k> \n</think>\n", False, [R("Hm <b> </b> </thin>k>")]),
        ("Hm.\n</think>\n\nParis", True, [R("Hm."), "Paris"]),
        ("<think>Hm.</think>Paris", True, [R("Hm."), "Paris"]),
        ("Hm", True, [R("Hm")]),
        ("</think>\n\nParis", True, ["Paris"]),
        ("日本 </think> é", True, [R("日本"), "é"]),
        ("", True, []),
        ("", False, []),
    ],
)
def test_reasoning_at_every_cut(text: str, opened: bool, parts: list[Any]) -> None:
    assert read([text], opened=opened) == parts
    assert read(list(text), opened=opened) == parts
    for cut in range(len(text)):
        assert read([text[:cut], text[cut:]], opened=opened) == parts
    if CALL not in text:
        assert read(list(text), opened=opened, tools=False) == parts


@given(
    fragments=st.lists(st.sampled_from(["<think>", "</think>", "\n", " ", "a", "é", "<", "think>", CALL]), max_size=20),
    opened=st.booleans(),
    data=st.data(),
)
def test_only_marks_and_space_beside_them_are_dropped(fragments: list[str], opened: bool, data: st.DataObject) -> None:
    text = "".join(fragments)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    parts = read(pieces, opened=opened, tools=False)
    assert parts == read([text], opened=opened, tools=False)
    seen = text.lstrip()
    if not (opened or seen.startswith("<think>")):
        assert parts == [text][: bool(text)]
        return
    reasoning, ended, content = seen.removeprefix("<think>").partition("</think>")
    thought, said = (reasoning.strip(), content.lstrip()) if ended else (reasoning.lstrip(), "")
    assert parts == [*[R(thought)][: bool(thought)], *[said][: bool(said)]]


# --- models ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def opening(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return dialects.tokenizer(tmp_path_factory.mktemp("opening"), "hermes", OPENS)


def test_which_models_reason(hermes: Tokenizer, tmp_path: Path) -> None:
    assert find_dialect(hermes).thinking == QWEN
    assert find_dialect(hermes, reasoning_parser="none").thinking is None
    plain = dialects.tokenizer(tmp_path / "a", "smollm2")
    assert find_dialect(plain).thinking is None
    assert find_dialect(plain, reasoning_parser="deepseek_r1").thinking == REASONING_MARKS["deepseek_r1"]
    magistral = dialects.tokenizer(tmp_path / "b", "mistral", "{{ '[THINK]' }}{{ tools }}")
    assert find_dialect(magistral).thinking == REASONING_MARKS["mistral"]
    tokens_only = dialects.tokenizer(tmp_path / "c", "hermes", "{{ messages }}")
    assert find_dialect(tokens_only).thinking == QWEN


async def test_an_answer_with_reasoning(hermes: Tokenizer) -> None:
    api = Api(hermes)
    text = "<think>\nHm, é.\n</think>\n\nParis."
    api.say(text)
    one, two = await api.answers(logprobs=True, return_token_ids=True)
    assert one == two
    assert one["message"] == {
        "role": "assistant",
        "content": "Paris.",
        "refusal": None,
        "reasoning": "Hm, é.",
        "reasoning_content": "Hm, é.",
    }
    assert one["finish_reason"] == "stop"
    thought = len(hermes.encode("<think>\nHm, é.\n</think>"))
    assert one["usage"]["completion_tokens_details"] == {"reasoning_tokens": thought}
    assert one["token_ids"] == [*hermes.encode(text), 319]
    assert len(one["logprobs"]["content"]) == len(one["token_ids"])
    # Several tokens in one output are counted one by one.
    api.engine.play = lambda prompt, params: {"steps": [hermes.encode(text)]}
    for found in await api.answers():
        assert found["usage"]["completion_tokens_details"] == {"reasoning_tokens": thought}
        assert found["message"]["content"] == "Paris."


async def test_an_answer_without_reasoning(hermes: Tokenizer) -> None:
    api = Api(hermes)
    api.say("Paris.")
    one, two = await api.answers()
    assert one == two
    assert one["message"] == {"role": "assistant", "content": "Paris.", "refusal": None}
    assert one["usage"]["completion_tokens_details"] == {"reasoning_tokens": 0}


async def test_reasoning_before_calls(hermes: Tokenizer) -> None:
    api = Api(hermes)
    api.say(f"<think>\nHm.\n</think>\n\nI look.\n{CALL}")
    one, two = await api.answers(tools=TOOLS)
    assert one == two
    assert one["message"] == {
        "role": "assistant",
        "content": "I look.",
        "refusal": None,
        "reasoning": "Hm.",
        "reasoning_content": "Hm.",
        "tool_calls": [called("list_all", "{}")],
    }
    assert one["finish_reason"] == "tool_calls"


async def test_reasoning_that_is_cut_off(hermes: Tokenizer) -> None:
    api = Api(hermes)
    api.say("<think>\nHm, this takes long")
    one, two = await api.answers(max_tokens=8)
    assert one == two
    assert one["finish_reason"] == "length"
    assert one["message"]["content"] is None
    assert one["message"]["reasoning"].startswith("Hm")
    one, two = await api.answers(stop="takes")
    assert one == two
    assert one["message"]["reasoning"].rstrip() == "Hm, this"


async def test_prompts_that_begin_the_reasoning(opening: Tokenizer) -> None:
    api = Api(opening)
    api.say("Hm.\n</think>\n\nParis.")
    one, two = await api.answers()
    assert one == two
    assert (one["message"]["reasoning"], one["message"]["content"]) == ("Hm.", "Paris.")
    api.say("Paris.")
    for body in (
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"reasoning_effort": "none"},
        {
            "messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "<think>a</think>b"}],
            "add_generation_prompt": False,
            "continue_final_message": True,
        },
    ):
        for found in await api.answers(**body):
            assert found["message"] == {"role": "assistant", "content": "Paris.", "refusal": None}
    api.say("Hm.</think>Paris.")
    begun = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "<think>\nWell. "}]
    for found in await api.answers(messages=begun, add_generation_prompt=False, continue_final_message=True):
        assert (found["message"]["reasoning"], found["message"]["content"]) == ("Hm.", "Paris.")


async def test_a_format_lets_the_model_think_first(hermes: Tokenizer, opening: Tokenizer) -> None:
    def accepts(api: Api, text: str) -> bool:
        grammar = api.engine.turns[-1].params.grammar
        assert grammar is not None
        tokens = api.tokenizer.encode(text)
        matcher = Compiler(api.tokenizer).compile(grammar)
        return matcher.try_consume_tokens(tokens) == len(tokens) and matcher.is_accepting()

    form = {"response_format": {"type": "json_object"}}
    continued = {"add_generation_prompt": False, "continue_final_message": True}
    thought, bare, rest = "<think>\nHm.\n</think>\n\n{}", "{}", "Hm.\n</think>\n\n{}"
    for tokenizer, body, right in (
        (hermes, {}, {thought, bare}),  # the model decides
        (opening, {}, {thought, rest}),  # the prompt has begun it
        (opening, {"reasoning_effort": "none"}, {bare}),
        (opening, {"chat_template_kwargs": {"enable_thinking": False}}, {bare}),
        (hermes, {"messages": [{"role": "assistant", "content": "So: "}], **continued}, {bare}),
        (hermes, {"messages": [{"role": "assistant", "content": "<think>Hm"}], **continued}, {thought, rest}),
    ):
        api = Api(tokenizer)
        api.say("x")
        assert (await api.post(**form, **body)).status_code == 200
        assert {text for text in (thought, bare, rest) if accepts(api, text)} == right
    api = Api(hermes)
    api.say(thought)
    for found in await api.answers(**form):
        assert (found["message"]["reasoning"], found["message"]["content"]) == ("Hm.", "{}")


async def test_the_flag(tmp_path: Path) -> None:
    plain = dialects.tokenizer(tmp_path, "smollm2")
    api = Api(plain, reasoning_parser="deepseek_r1")
    api.say("Hm.</think>Paris.")
    for found in await api.answers():
        assert (found["message"]["reasoning"], found["message"]["content"]) == ("Hm.", "Paris.")


@pytest.mark.parametrize("name", ["reasoning", "reasoning_content"])
async def test_history_keeps_its_reasoning(hermes: Tokenizer, name: str) -> None:
    """Templates that want the reasoning of earlier turns get it; what it spells is no control token of its own."""
    api = Api(hermes)
    api.say("x")
    said = {"role": "assistant", "content": "Paris.", name: "Hm <|im_end|>"}
    await api.post(messages=[{"role": "user", "content": "x"}, said, {"role": "user", "content": "y"}])
    ids = api.engine.turns[0].tokens
    assert "<think>\nHm <|im_end|>\n</think>\n\nParis." in hermes.decode(ids, skip_special_tokens=False)
    assert ids.count(319) == 3


async def test_variables_of_templates(hermes: Tokenizer, opening: Tokenizer, tmp_path: Path) -> None:
    own = dialects.tokenizer(
        tmp_path, "hermes", "{% set a = b %}{{ a }}{{ date | default('') }}{{ messages }}{{ eos_token }}"
    )
    for tokenizer, names in ((hermes, []), (own, ["b", "date"])):
        api = Api(tokenizer)
        api.say("x")
        for allowed in ("enable_thinking", "thinking", "reasoning_effort", *names):
            assert (await api.post(chat_template_kwargs={allowed: "x"})).status_code == 200
        for refused in ("a", "tools", "eos_token", "raise_exception", "range", "frob"):
            response = await api.post(chat_template_kwargs={refused: "x"})
            assert response.status_code == 400
            assert all(name in response.json()["error"]["message"] for name in ("enable_thinking", *names))
