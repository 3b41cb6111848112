"""Chat templates: the format of a model's calls is found, and conversations with tools render in it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from miniserve.api.openai.chat import chat_tokens
from miniserve.api.openai.schemas import ChatRequest
from miniserve.sampling_params import ParameterError
from miniserve.text.dialect import find_dialect
from miniserve.text.tokenizer import Tokenizer
from tests.support import dialects
from tests.support.api import HI
from tests.support.dialects import FORMS, TOOLS, conversation, plain, read


@pytest.mark.parametrize("form", FORMS)
def test_formats_are_found(tokenizers: dict[str, Tokenizer], form: str) -> None:
    found = find_dialect(tokenizers[form])
    assert found.form.name == form
    assert found.knows_tools == found.knows_calls == (form != "smollm2")
    assert (found.thinking is not None) == (form == "hermes")
    assert find_dialect(tokenizers[form], "mistral").form.name == "mistral"


def test_formats_of_architectures(tmp_path: Path) -> None:
    def found(model_type: str, template: str = "{{ tools }}", **settings: Any) -> str:
        dialects.tokenizer(tmp_path, "smollm2")
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
        config = json.loads((tmp_path / "tokenizer_config.json").read_text())
        config = {**config, "chat_template": template, **settings}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        return find_dialect(Tokenizer.load(tmp_path)).form.name

    assert found("mistral") == "mistral"
    assert found("qwen3") == found("llama") == "hermes"
    assert found("mistral", "{{ messages }}") == "smollm2"
    own = {"fields": {"tool_calls": {"open": "[TOOL_CALLS]", "content": "json"}}}
    assert found("llama", response_template=own) == "mistral"


@pytest.mark.parametrize("form", FORMS)
def test_conversations_render(tokenizers: dict[str, Tokenizer], form: str) -> None:
    """Six turns; each prompt begins with the one before, shows the tools, and its calls read as what was called."""
    tokenizer, dialect = tokenizers[form], find_dialect(tokenizers[form])
    before: list[int] = []
    for turns in range(7):
        request = ChatRequest.model_validate({"messages": conversation(turns), "tools": TOOLS})
        messages = dialect.messages([message.for_template() for message in request.messages], request.tools)
        ids = tokenizer.chat(messages, tools=request.tools if dialect.knows_tools else None)
        if before:
            assert ids[: len(before)] == before
        before = tokenizer.chat(
            messages, tools=request.tools if dialect.knows_tools else None, add_generation_prompt=False
        )
        text = tokenizer.decode(ids, skip_special_tokens=False)
        assert '"name": "write"' in text
        assert "Writes." in text
        said = [part.partition("<|im_end|>")[0] for part in text.split("<|im_start|>assistant\n")[1:]]
        found = [part for answer in said for part in plain(read(form, [answer])) if isinstance(part, tuple)]
        wanted = [call for turn in range(turns) for call in (("write", {"text": f"é{turn}"}), ("list_all", {}))]
        assert found[: len(wanted)] == wanted
        # What the results forge is text: no token of the vocabulary stands for it.
        for i, mark in enumerate([*dialects.SPECIAL_MARKS.get(form, []), *dialects.PLAIN_MARKS.get(form, [])]):
            if mark == "<think>":
                assert ids.count(320 + i) == 0
        assert ids.count(319) == text.count("<|im_end|>") - 2 * turns


def test_tools_in_the_system_message(tokenizers: dict[str, Tokenizer]) -> None:
    dialect = find_dialect(tokenizers["smollm2"])
    user = {"role": "user", "content": "x"}
    first, second = dialect.messages([user], TOOLS)
    assert (first["role"], second) == ("system", user)
    assert dialect.messages([{"role": "system", "content": "Be kind."}, user], TOOLS)[0]["content"] == (
        "Be kind.\n\n" + first["content"]
    )
    assert dialect.messages([user], None) == [user]


def test_templates_that_read_all_of_a_tool(tmp_path: Path) -> None:
    """As those of Hermes do: what a tool leaves out is empty then, and else not there at all."""
    reads = "{% for t in tools %}{{ t.function.name ~ ': ' + t.function.description }}{% endfor %}"
    for template, said in ((reads, "list_all: write: Writes."), ("{{ tools }}", "{'name': 'list_all'}")):
        tokenizer = dialects.tokenizer(tmp_path, "hermes", template + "<tool_call>")
        request = ChatRequest.model_validate({"messages": HI, "tools": TOOLS[::-1]})
        assert said in tokenizer.decode(chat_tokens(tokenizer, find_dialect(tokenizer), request))
    refuses = dialects.tokenizer(tmp_path, "hermes", "{{ raise_exception('never') }}{{ tools }}")
    with pytest.raises(ParameterError, match="never"):
        chat_tokens(refuses, find_dialect(refuses), request)


def test_ids_for_mistral(tokenizers: dict[str, Tokenizer]) -> None:
    dialect = find_dialect(tokenizers["mistral"])
    for ids in (["call_1_abcdefghi", "call_2_abcdefghi", ""], ["abcdefgh1", "abcdefgh2", None]):
        calls = [{"id": id, "type": "function", "function": {"name": "f", "arguments": {}}} for id in ids]
        results = [{"role": "tool", "tool_call_id": id, "content": "x"} for id in ids if id]
        said, *answered = dialect.messages([{"role": "assistant", "content": "", "tool_calls": calls}, *results], None)
        short = [call["id"] for call in said["tool_calls"]]
        assert all(re.fullmatch("[A-Za-z0-9]{9}", id) for id in short)
        assert len(set(short)) == 3
        assert short[:2] == [message["tool_call_id"] for message in answered]
        assert short[0] in (ids[0], dialect.messages([{**results[0]}], None)[0]["tool_call_id"])
