"""Small chat templates, one for each format of tool calls, that render conversations as the models of that format know
them; and tokenizers that have them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx

from miniserve.api.app import create_app
from miniserve.config import EngineConfig, ServeConfig
from miniserve.text.tokenizer import Tokenizer
from tests.support import tiny
from tests.support.fake_engine import FakeClient

HEAD = "{{ '<|im_start|>' ~ m.role ~ '\\n' }}"
GENERATE = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
TOOLS = "{% if tools %}{{ '<|im_start|>system\\n<tools>' ~ (tools | tojson) ~ '</tools><|im_end|>\\n' }}{% endif %}"


def chatml(calls: str, start: str = "") -> str:
    """A template in which `calls` renders the calls of the message `m`."""
    return (
        f"{TOOLS}{{% for m in messages %}}{HEAD}{start}{{{{ m.content }}}}"
        f"{{% if m.tool_calls %}}{calls}{{% endif %}}{{{{ '<|im_end|>\\n' }}}}{{% endfor %}}{GENERATE}"
    )


THOUGHT = "{% if m.reasoning_content %}{{ '<think>\\n' ~ m.reasoning_content ~ '\\n</think>\\n\\n' }}{% endif %}"
HERMES_CALLS = (
    '{% for c in m.tool_calls %}{{ \'\\n<tool_call>\\n{"name": "\' ~ c.function.name ~ \'", "arguments": \' }}'
    "{{ c.function.arguments if c.function.arguments is string else c.function.arguments | tojson }}"
    "{{ '}\\n</tool_call>' }}{% endfor %}"
)
TEMPLATES = {
    "hermes": chatml(HERMES_CALLS, THOUGHT),
    "qwen3_coder": chatml(
        "{% for c in m.tool_calls %}{{ '\\n<tool_call>\\n<function=' ~ c.function.name ~ '>\\n' }}"
        "{% for k, v in c.function.arguments | items %}{{ '<parameter=' ~ k ~ '>\\n' }}"
        "{{ v if v is string else v | tojson }}{{ '\\n</parameter>\\n' }}{% endfor %}"
        "{{ '</function>\\n</tool_call>' }}{% endfor %}"
    ),
    "llama3_json": chatml(
        "{% if m.tool_calls | length > 1 %}{{ raise_exception('one call at a time') }}{% endif %}"
        "{% set f = m.tool_calls[0].function %}"
        "{{ '{\"name\": \"' ~ f.name ~ '\", \"parameters\": ' ~ (f.arguments | tojson) ~ '}' }}"
    ),
    "mistral": chatml(
        "{{ '[TOOL_CALLS] [' }}{% for c in m.tool_calls %}"
        "{% if c.id is not defined or c.id | length != 9 %}{{ raise_exception('ids have 9 characters') }}{% endif %}"
        '{{ \'{"name": "\' ~ c.function.name ~ \'", "arguments": \' ~ (c.function.arguments | tojson) }}'
        "{{ ', \"id\": \"' ~ c.id ~ '\"}' }}{{ ', ' if not loop.last }}{% endfor %}{{ ']' }}"
    ),
    "mistral_args": chatml(
        "{% for c in m.tool_calls %}{{ '[TOOL_CALLS]' ~ c.function.name ~ '[ARGS]' }}"
        "{{ c.function.arguments | tojson }}{% endfor %}"
    ),
    "smollm2": tiny.CHATML,
}
SPECIAL_MARKS = {
    "llama3_json": ["<|python_tag|>"],
    "mistral": ["[TOOL_CALLS]"],
    "mistral_args": ["[TOOL_CALLS]", "[ARGS]"],
}
PLAIN_MARKS = {
    "hermes": ["<tool_call>", "</tool_call>", "<think>", "</think>"],
    "qwen3_coder": ["<tool_call>", "</tool_call>"],
}
"""Tokens of their own that are no special ones, as with Qwen."""


def tokenizer(folder: Path, form: str, template: str | None = None) -> Tokenizer:
    """One with the marks of a format in its vocabulary; writes its files to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    tiny.write_tokenizer(folder)
    data = json.loads((folder / "tokenizer.json").read_text())
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    marks = [(mark, True) for mark in SPECIAL_MARKS.get(form, [])] + [(m, False) for m in PLAIN_MARKS.get(form, [])]
    for i, (mark, special) in enumerate(marks):
        data["added_tokens"].append({"id": 320 + i, "content": mark, "special": special, **flags})
    (folder / "tokenizer.json").write_text(json.dumps(data))
    config = {"model_type": "llama", "bos_token_id": 317, "eos_token_id": 319}
    (folder / "config.json").write_text(json.dumps(config))
    return Tokenizer.load(folder, template or TEMPLATES[form])


class Server:
    """The API of a tiny model with a format's template, and the engine behind it. `say` is what the model will say."""

    def __init__(self, tokenizer: Tokenizer, engine: FakeClient | None = None, base: str = "", **config: Any) -> None:
        self.tokenizer = tokenizer
        self.engine = engine or FakeClient()
        self.engine.max_model_len, self.engine.vocab_size = 4096, tokenizer.vocab_size
        settings = ServeConfig(engine=EngineConfig(model="tiny"), served_model_names=["tiny"], **config)
        self.app = create_app(settings, self.engine, self.engine.feed, tokenizer, {})  # type: ignore[arg-type]
        transport = httpx.ASGITransport(app=self.app, raise_app_exceptions=False)
        self.http = httpx.AsyncClient(transport=transport, base_url=f"http://test{base}")
        self.say("Hello")

    def say(self, text: str, **play: Any) -> None:
        end = {"stop_token": 319} if play.get("finish", "stop") == "stop" else {}
        steps = [[token] for token in self.tokenizer.encode(text)] + ([[319]] if end else [])
        self.engine.play = lambda prompt, params: {"steps": steps, "cached": 3, **end, **play}

    @property
    def prompt(self) -> str:
        return self.tokenizer.decode(self.engine.turns[-1].tokens, skip_special_tokens=False)
