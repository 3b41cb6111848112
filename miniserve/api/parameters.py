"""Parameters of the APIs that mean nothing here. Those that would change the answer are refused, with what to do
instead; all others are ignored, and the answer's `X-Ignored-Parameters` names them (docs/api.md has the table), keys
inside of messages and the like too."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from miniserve.sampling_params import ParameterError

IGNORED_HEADER = "X-Ignored-Parameters"
MAX_NAMED = 16
NAME = re.compile(r"[A-Za-z0-9_.\[\]-]{1,64}")
ASKS_FOR_NOTHING: tuple[Any, ...] = (None, False, 0, "", [], {})
"""Values of a parameter that are as good as leaving it out."""
HARMLESS: Mapping[str, tuple[Any, ...]] = {"modalities": (["text"],), "best_of": (1,)}
"""More of these, for some."""

_STRUCTURED = "use `structured_outputs` or `response_format`"
_COMPLETIONS: Mapping[str, str] = {
    "use_beam_search": "tokens are sampled, or taken greedily with `temperature` 0",
    "prompt_logprobs": "log-probabilities are of generated tokens only",
    "truncate_prompt_tokens": "cut the input yourself",
    "bad_words": "use `logit_bias`",
    "allowed_token_ids": _STRUCTURED,
    "logits_processors": _STRUCTURED,
    "guided_json": _STRUCTURED,
    "guided_regex": _STRUCTURED,
    "guided_choice": _STRUCTURED,
    "guided_grammar": _STRUCTURED,
}
REFUSED_BY_COMPLETIONS: Mapping[str, str] = {
    **_COMPLETIONS,
    "suffix": "put all of the text into `prompt`",
    "best_of": "ask for `n` choices and pick one",
}
REFUSED_BY_CHAT: Mapping[str, str] = {
    **_COMPLETIONS,
    "functions": "use `tools`",
    "function_call": "use `tool_choice`",
    "audio": "this model writes text only",
    "modalities": "this model writes text only",
    "web_search_options": "let the model call a tool of yours",
    "moderation": "nothing is moderated here",
    "echo": "use /v1/completions",
    "chat_template": "start the server with --chat-template",
    "documents": "put them into `messages`",
}
REFUSED_BY_RESPONSES: Mapping[str, str] = {
    "background": "answers come while the connection is open: use `stream`",
    "context_management": "nothing is compacted here: send a shorter `input`",
    "conversation": "use `previous_response_id`",
    "prompt": "there are no stored prompts here: use `instructions` and `input`",
    "moderation": "nothing is moderated here",
    "image": "this model writes text only",
    "top_logprobs": "use /v1/chat/completions for log-probabilities",
}
REFUSED_BY_MESSAGES: Mapping[str, str] = {
    "container": "there are no containers here",
    "mcp_servers": "let the model call tools of yours",
    "context_management": "nothing is edited here: send the `messages` that count",
}


def ignored_names(known: Collection[str], refused: Mapping[str, str], given: Mapping[Any, Any]) -> list[str]:
    """Names of what `given` holds beside the `known` fields. Raises `ParameterError` for what is `refused`."""
    names = []
    for name in given.keys() - known:
        if given[name] in ASKS_FOR_NOTHING or given[name] in HARMLESS.get(name, ()):
            continue
        if name in refused:
            raise ParameterError(name, f"`{name}` is not supported: {refused[name]}.")
        names.append(str(name))
    return names


def ignored_header(names: Iterable[str]) -> dict[str, str]:
    """The header that tells them; clients may have made up names that fit into none."""
    told = sorted({name if NAME.fullmatch(name) else "..." for name in names})
    return {IGNORED_HEADER: ", ".join([*told[:MAX_NAMED], *["..."][: len(told) > MAX_NAMED]])} if told else {}
