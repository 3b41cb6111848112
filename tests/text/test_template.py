"""Chat templates: what transformers gives them and makes of them, and the errors of those that fail."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from miniserve.sampling_params import ParameterError
from miniserve.text.tokenizer import Tokenizer
from tests.support import tiny

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
ROLES = st.sampled_from(["system", "user", "assistant"])
STOP = 319  # <|im_end|>


@given(messages=st.lists(st.tuples(ROLES, TEXT), min_size=1, max_size=4), generate=st.booleans())
def test_chat_like_transformers(
    tokenizer: Tokenizer, peer: Any, messages: list[tuple[str, str]], generate: bool
) -> None:
    said = [{"role": role, "content": content} for role, content in messages]
    expected = peer.apply_chat_template(said, add_generation_prompt=generate, return_dict=False)
    assert tokenizer.chat(said, add_generation_prompt=generate) == expected


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}\n  {% if m.role == 'user' %}\nU {{ m.content }}\n  {% endif %}\n{% endfor %}\nend\n",
        "{{ bos_token }}{{ tools | tojson }}|{{ tools | tojson(indent=2) }}|{{ messages | tojson }}",
        "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.content | trim }}{% endfor %}",
        "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
        "{{ strftime_now('%Y') }}{{ documents }}{{ add_generation_prompt }}{{ pad_token }}{{ nothing }}",
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}",
    ],
)
def test_templates_find_what_transformers_gives_them(tiny_folder: Path, peer: Any, template: str) -> None:
    said = [{"role": "user", "content": " <é & 'x'\n"}, {"role": "assistant", "content": "hello"}]
    tools = [{"type": "function", "function": {"name": "é<b>", "parameters": {"b": 1, "a": [None, True]}}}]
    expected = peer.apply_chat_template(
        said, tools=tools, chat_template=template, add_generation_prompt=True, return_dict=False
    )
    assert Tokenizer.load(tiny_folder, template).chat(said, tools=tools) == expected


@given(content=TEXT.filter(str.strip))
def test_going_on_with_the_last_message_like_transformers(tokenizer: Tokenizer, peer: Any, content: str) -> None:
    said = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": content}]
    expected = peer.apply_chat_template(said, continue_final_message=True, return_dict=False)
    assert tokenizer.chat(said, add_generation_prompt=False, continue_final_message=True) == expected


def test_going_on_leaves_the_callers_messages_alone(tokenizer: Tokenizer) -> None:
    said = [{"role": "assistant", "content": "Once"}]
    tokenizer.chat(said, add_generation_prompt=False, continue_final_message=True)
    assert said == [{"role": "assistant", "content": "Once"}]


def test_a_message_is_continued_or_begun(tokenizer: Tokenizer) -> None:
    with pytest.raises(ParameterError, match="add_generation_prompt") as raised:
        tokenizer.chat([{"role": "user", "content": "x"}], continue_final_message=True)
    assert raised.value.param == "continue_final_message"


def test_no_messages_is_an_error(tokenizer: Tokenizer) -> None:
    with pytest.raises(ParameterError, match="at least one"):
        tokenizer.chat([])


def test_a_model_without_a_template_says_what_to_do(folder: Path) -> None:
    tiny.edit_json(folder / "tokenizer_config.json", chat_template=None)
    found = Tokenizer.load(folder)
    with pytest.raises(ParameterError, match="--chat-template"):
        found.chat([{"role": "user", "content": "x"}])


def test_a_template_may_come_from_outside(folder: Path) -> None:
    said = [{"role": "user", "content": "x"}]
    text = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    (folder / "own.jinja").write_text(text)
    for given_template in (text, str(folder / "own.jinja")):
        assert Tokenizer.load(folder, given_template).chat(said) == list(b"[x]")
    with pytest.raises(ParameterError, match="no file that can be read"):
        Tokenizer.load(folder, str(folder / "none.jinja"))


def test_a_template_lies_in_its_own_file_or_has_a_name(folder: Path) -> None:
    tiny.edit_json(
        folder / "tokenizer_config.json",
        chat_template=[{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}],
    )
    said, tools = [{"role": "user", "content": "x"}], [{"type": "function"}]
    found = Tokenizer.load(folder)
    assert (found.chat(said), found.chat(said, tools=tools)) == (list(b"D"), list(b"T"))
    (folder / "chat_template.jinja").write_text("F")
    assert Tokenizer.load(folder).chat(said) == list(b"F")


@pytest.mark.parametrize("text", ["{% for %}", "{{ unclosed"])
def test_a_template_that_is_no_jinja_is_refused_at_once(folder: Path, text: str) -> None:
    with pytest.raises(ParameterError, match="not valid jinja"):
        Tokenizer.load(folder, text)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].content + 1 }}", "cannot render"),
        ("{{ messages[9].content.x }}", "refuses"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "refuses"),  # the sandbox
    ],
)
def test_what_a_template_refuses_is_the_clients_error(folder: Path, template: str, message: str) -> None:
    with pytest.raises(ParameterError, match=message):
        Tokenizer.load(folder, template).chat([{"role": "user", "content": "x"}])


def test_variables_reach_the_template_but_not_its_own(folder: Path) -> None:
    said = [{"role": "user", "content": "x"}]
    found = Tokenizer.load(folder, "{{ eos_token }}{% if enable_thinking %}yes{% else %}no{% endif %}")
    assert found.chat(said, template_kwargs={"enable_thinking": True}) == [STOP, *found.encode("yes")]
    with pytest.raises(ParameterError, match="`messages`"):
        found.chat(said, template_kwargs={"messages": []})
