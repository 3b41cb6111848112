"""Templates that demand something of conversations: any conversation is rendered, nothing is lost, nothing moves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from miniserve.text.dialect import Dialect, find_dialect
from miniserve.text.template import Demands, Message
from miniserve.text.tokenizer import Tokenizer
from tests.support import dialects

SAY = "{{ '<' ~ m.role ~ '>' ~ m.content }}"
CALLS = (
    "{% for c in m.tool_calls or [] %}{{ '[' ~ c.function.name ~ (c.function.arguments | tojson) ~ ']' }}{% endfor %}"
)
END = "{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"


def refusing(when: str, why: str = "no") -> str:
    return f"{{% if {when} %}}{{{{ raise_exception('{why}') }}}}{{% endif %}}"


def template(*checks: str, before: str = "", body: str = SAY + CALLS) -> str:
    return f"{before}{{% for m in messages %}}{''.join(checks)}{body}{END}"


ALTERNATE = (
    "{% set ns = namespace(user=true) %}{% for m in messages if m.role != 'system' %}"
    "{% if m.role == 'user' or (m.role == 'assistant' and not m.tool_calls) %}"
    "{% if (m.role == 'user') != ns.user %}{{ raise_exception('alternate') }}{% endif %}"
    "{% set ns.user = not ns.user %}{% endif %}{% endfor %}"
)
NO_USER = (
    "{% if not messages | selectattr('role', 'equalto', 'user') | list %}{{ raise_exception('no user') }}{% endif %}"
)
TEMPLATES: dict[str, tuple[str, set[str]]] = {
    "anything": (template(), set()),
    "system first": (template(refusing("m.role == 'system' and not loop.first")), {"one_system", "system_first"}),
    "system first, and a user": (
        template(refusing("m.role == 'system' and not loop.first"), before=NO_USER),
        {"one_system", "system_first", "user_first"},
    ),
    "the last system message, in front": (
        "{% for m in messages %}{% if m.role == 'system' %}{% set last = m.content %}{% endif %}{% endfor %}"
        "{% for m in messages if m.role == 'system' %}{% if loop.last %}{{ '<system>' ~ m.content ~ '\\n' }}{% endif %}"
        f"{{% endfor %}}{{% for m in messages if m.role != 'system' %}}{SAY}{CALLS}{END}",
        {"one_system", "system_first"},
    ),
    "no system message": (template(refusing("m.role == 'system'")), {"no_system", "system_first"}),
    "a system message is left out": (
        template(body="{% if m.role != 'system' %}" + SAY + CALLS + "{% endif %}"),
        {"no_system", "system_first"},
    ),
    "user and assistant alternate": (
        template(refusing("m.role == 'system' and not loop.first"), before=ALTERNATE),
        {"one_system", "system_first", "alternate", "user_first", "no_user_after_tool", "tool_after_call"},
    ),
    "no tools": (template(refusing("m.role == 'tool' or m.tool_calls")), {"no_tool", "tool_after_call"}),
    "results behind calls": (
        template(refusing("m.role == 'tool' and not (loop.previtem.tool_calls or loop.previtem.role == 'tool')")),
        {"tool_after_call"},
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Tokenizer, Dialect]]:
    def load(name: str, form: str, text: str | None) -> tuple[Tokenizer, Dialect]:
        tokenizer = dialects.tokenizer(tmp_path_factory.mktemp("t") / name.replace(" ", "-"), form, text)
        return tokenizer, find_dialect(tokenizer, form)

    made = {name: load(name, "hermes", text) for name, (text, _) in TEMPLATES.items()}
    return made | {form: load(form, form, None) for form in dialects.TEMPLATES}


@pytest.mark.parametrize("name", TEMPLATES)
def test_demands_are_found(models: dict[str, tuple[Tokenizer, Dialect]], name: str) -> None:
    demands = models[name][1].demands
    assert demands == TEMPLATES[name][1]


def test_a_template_that_renders_anything_gets_what_clients_send() -> None:
    messages = [{"role": "system", "content": "a"}, {"role": "system", "content": "b"}]
    assert Demands().met(messages) is messages
    assert Demands.of(lambda messages: None) == Demands()


TEXTS = st.integers(10_000, 99_999).map(str)
CALL = {"id": "a1b2c3d4e", "type": "function", "function": {"name": "probe", "arguments": {"a": "b"}}}


@st.composite
def turns(draw: st.DrawFn) -> list[list[Message]]:
    """What is added to a conversation before each answer; each turn but the first begins with the answer before it."""
    out: list[list[Message]] = []
    for number in range(draw(st.integers(1, 5))):
        turn: list[Message] = []
        if not number:
            turn += [{"role": "system", "content": text} for text in draw(st.lists(TEXTS, max_size=2))]
        elif draw(st.booleans()):
            turn.append({"role": "assistant", "content": draw(TEXTS), "tool_calls": [CALL]})
            turn.append({"role": "tool", "tool_call_id": "a1b2c3d4e", "name": "probe", "content": draw(TEXTS)})
        else:
            turn.append({"role": "assistant", "content": draw(TEXTS)})
        for role in draw(st.lists(st.sampled_from(["user", "system", "tool", "user"]), max_size=3)):
            more: dict[str, Any] = {"tool_call_id": "a1b2c3d4e"} if role == "tool" else {}
            turn.append({"role": role, "content": draw(TEXTS), **more})
        if turn and turn[-1]["role"] == "assistant":
            turn.append({"role": "user", "content": draw(TEXTS)})
        out.append(turn)
    return out


@pytest.mark.parametrize("name", [*TEMPLATES, *dialects.TEMPLATES])
@settings(max_examples=25, deadline=None)
@given(turns())
def test_each_prompt_begins_with_the_one_before(
    models: dict[str, tuple[Tokenizer, Dialect]], name: str, grown: list[list[Message]]
) -> None:
    tokenizer, dialect = models[name]
    before: list[int] = []
    for count in range(1, len(grown) + 1):
        conversation = [dict(message) for turn in grown[:count] for message in turn]
        if not conversation:
            continue
        prompt = tokenizer.chat(dialect.messages(conversation, None), add_generation_prompt=False)
        assert prompt[: len(before)] == before
        text, at = tokenizer.decode(prompt, skip_special_tokens=False), 0
        leading = name == "the last system message, in front"
        for message in conversation:
            at = text.find(message["content"], 0 if leading else at)
            assert at >= 0, (text, message)
        before = prompt


def test_files_of_templates_are_probed_quickly(tmp_path: Path) -> None:
    tokenizer = dialects.tokenizer(tmp_path, "mistral")
    rendered: list[list[Message]] = []

    def render(messages: list[Message]) -> str | None:
        rendered.append(messages)
        return tokenizer.rendered(messages)

    Demands.of(render)
    assert len(rendered) < 20
