"""A model that follows a script, whatever stands around it: for agents, whose prompts are tens of thousands of tokens.

Its weights are set, not trained. A script names marks, which are words of a kind that no prompt has by chance, in their
order, and the answer to each. One attention head looks for the furthest mark in the whole prompt, wherever it stands,
and the model writes the answer to it, token by token. So an agent that runs `echo mark3` reads mark3 in the result, and
its next prompt gets the answer to mark3. A prompt without marks gets `DEFAULT`.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch

CODE = 64
"""Size of the random unit vectors that stand for what an answer is made of; also the size of the head."""
MARKS = 128
"""Dimension 0 is the same for all tokens, those from 1 on are the marks', those from `MARKS` on hold the code of
what is to follow."""
DEFAULT = "All right."
END = ""


def make_model(folder: Path, script: dict[str, str], source: Path, template: str, max_len: int = 131072) -> Path:
    """Write a model that answers as `script` says: mark -> answer, marks in their order, each in one answer at most.

    It has the tokenizer of the model in `source`, with marks and pieces of answers as further tokens, and the chat
    template `template`. Returns `folder`.
    """
    folder.mkdir(parents=True)
    starts, follows = _pieces(script)
    data = json.loads((source / "tokenizer.json").read_text())
    settings = json.loads((source / "tokenizer_config.json").read_text())
    vocab = data["model"]["vocab"]
    added = {text: len(vocab) + i for i, text in enumerate(dict.fromkeys([*script, *follows]))}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    data["added_tokens"] += [{"id": i, "content": text, **flags} for text, i in added.items()]
    (folder / "tokenizer.json").write_text(json.dumps(data))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": template}))
    ids = added | {END: vocab[settings["eos_token"]]}
    _write_weights(folder, list(script), starts, follows, ids, max_len)
    return folder


def _pieces(script: dict[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """Answers in pieces, each of which has one successor: the first piece of each answer, and what follows each piece.
    The pieces are the marks and what stands between them."""
    starts: dict[str, str] = {}
    follows = {DEFAULT: END}
    for mark, answer in script.items():
        cut = [text for text in re.split("(" + "|".join(script) + ")", answer) if text]
        for piece, following in zip(cut, [*cut[1:], END], strict=True):
            assert follows.setdefault(piece, following) == following, f"two answers have {piece!r}: change one of them"
        starts[mark] = cut[0]
    return starts, dict.fromkeys(script, END) | follows  # a mark in no answer has a code, too: see below


def _write_weights(
    folder: Path, marks: list[str], starts: dict[str, str], follows: dict[str, str], ids: dict[str, int], max_len: int
) -> None:
    """All weights are 0 but those of: embeddings, which hold the code of what follows in an answer; one head, which
    finds the furthest mark and gives the code of what its answer starts with; and the logits of codes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    assert len(marks) < MARKS
    config = LlamaConfig(
        vocab_size=max(ids.values()) + 1,
        hidden_size=MARKS + CODE,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=CODE,
        max_position_embeddings=max_len,
        rope_parameters={"rope_type": "default", "rope_theta": 1e12},
        tie_word_embeddings=False,
        bos_token_id=ids[END],
        eos_token_id=ids[END],
        pad_token_id=ids[END],
    )
    model: Any = LlamaForCausalLM(config)
    state = {name: torch.full_like(value, "norm" in name) for name, value in model.state_dict().items()}
    embed, head = state["model.embed_tokens.weight"], state["lm_head.weight"]
    q, k, v, o = (state[f"model.layers.0.self_attn.{name}_proj.weight"] for name in "qkvo")
    drawn = torch.randn(len(ids), CODE, generator=torch.Generator().manual_seed(0))
    codes = dict(zip(ids, torch.nn.functional.normalize(drawn), strict=True))
    slow = CODE // 2 - 1  # a dimension of the head that rope hardly turns within the context
    embed[:, 0] = 1
    q[slow, 0] = 1
    o[MARKS:] = torch.eye(CODE)
    for number, mark in enumerate(marks, 1):
        embed[ids[mark], number] = 8
        k[slow, number] = 4 * number
        v[:, number] = codes[starts[mark]] / 10  # less than what stands in the last token itself
    for piece, following in follows.items():
        embed[ids[piece], MARKS:] = 8 * codes[following]
    for text, code in codes.items():
        head[ids[text], MARKS:] = 10 * code
    head[ids[DEFAULT], 0] = 2
    model.load_state_dict(state)
    model.save_pretrained(folder)
