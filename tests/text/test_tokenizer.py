"""Tokens: what transformers makes of a text, and the bytes each one stands for."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import example, given
from hypothesis import strategies as st

from miniserve.config import ConfigError
from miniserve.sampling_params import ParameterError
from miniserve.text.tokenizer import Tokenizer, byte_alphabet
from tests.support import tiny

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
END, START, STOP = range(317, 320)  # <|endoftext|>, <|im_start|>, <|im_end|>


@given(text=TEXT)
@example(text="hello the 你好 😀é€ ")
def test_encode_and_decode_like_transformers(tokenizer: Tokenizer, peer: Any, text: str) -> None:
    ids = tokenizer.encode(text)
    assert ids == peer.encode(text)
    assert tokenizer.decode(ids) == peer.decode(ids) == text
    assert b"".join(tokenizer.token_bytes(i) for i in ids) == text.encode()


@given(ids=st.lists(st.integers(0, 319), max_size=20))
def test_any_tokens_decode_like_in_transformers(tokenizer: Tokenizer, peer: Any, ids: list[int]) -> None:
    assert tokenizer.decode(ids) == peer.decode(ids, skip_special_tokens=True)
    assert tokenizer.decode(ids, skip_special_tokens=False) == peer.decode(ids)
    whole = b"".join(tokenizer.token_bytes(i) for i in ids if i not in tokenizer.special_ids)
    assert whole.decode("utf-8", "replace") == tokenizer.decode(ids)


def test_characters_are_split_across_tokens(tokenizer: Tokenizer) -> None:
    """The tiny tokenizer is as awkward as real ones: what other tests build on."""
    assert [tokenizer.token_bytes(i) for i in tokenizer.encode("😀")] == [b"\xf0\x9f", b"\x98", b"\x80"]
    assert [tokenizer.token_bytes(i) for i in tokenizer.encode("你好")] == [b"\xe4\xbd", b"\xa0\xe5", b"\xa5", b"\xbd"]
    assert len(tokenizer.encode(" the")) == 1


def test_the_byte_alphabet_is_gpt2s() -> None:
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    assert byte_alphabet() == bytes_to_unicode()


def test_facts_of_the_folder(tokenizer: Tokenizer) -> None:
    assert tokenizer.vocab_size == 320
    assert tokenizer.special_ids == {END, START, STOP}
    assert tokenizer.eos_token_ids == {END, STOP}


def test_a_raw_prompt_may_hold_control_tokens(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("a<|im_end|>") == [ord("a"), STOP]


def test_special_and_unknown_ids_have_bytes_too(tokenizer: Tokenizer) -> None:
    assert tokenizer.token_bytes(STOP) == b"<|im_end|>"
    assert tokenizer.token_bytes(320) == tokenizer.token_bytes(10**9) == tokenizer.token_bytes(-1) == b""


ENDS: list[tuple[Any, Any, Any, set[int], bool]] = [
    ([END, STOP], END, "<|im_end|>", {END, STOP}, False),
    (STOP, STOP, None, {STOP}, False),
    (None, END, "<|im_end|>", {END, STOP}, True),
    (None, [END], {"content": "<|im_end|>", "special": True}, {END, STOP}, True),
    (7, 8, "<|im_end|>", {7, 8, STOP}, True),
    ([7, 8], None, "<|endoftext|>", {7, 8, END}, True),
    (None, None, "<|im_end|>", {STOP}, False),
    (0, 8, None, {0, 8}, True),
    ("<|im_end|>", "<|endoftext|>", None, {STOP, END}, True),  # ids as text
    ([10**6, END], None, None, {10**6, END}, False),  # one that the model has no row for
    (-1, [None, True, 2.5, END], "<no such token>", {END}, False),
    (None, None, None, set(), False),
]


@pytest.mark.parametrize(("generation", "config", "text", "eos", "differ"), ENDS)
def test_any_token_that_a_file_calls_the_end_ends_a_turn(
    folder: Path,
    generation: Any,
    config: Any,
    text: Any,
    eos: set[int],
    differ: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    (folder / "config.json").write_text(json.dumps({"eos_token_id": config}))
    tiny.edit_json(folder / "tokenizer_config.json", eos_token=text)
    assert Tokenizer.load(folder).eos_token_ids == eos
    assert ("Each of them ends a turn" in caplog.text) == differ, caplog.text


def test_other_names_of_end_tokens(folder: Path) -> None:
    for name in ("generation_config.json", "config.json"):
        (folder / name).unlink(missing_ok=True)
    tiny.edit_json(folder / "tokenizer_config.json", eos_token=None, eot_token="<|im_end|>")
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "<|endoftext|>"}}))
    assert Tokenizer.load(folder).eos_token_ids == {END, STOP}


def test_a_vocabulary_larger_than_the_models_is_pointed_out(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "config.json").write_text(json.dumps({"vocab_size": 320}))
    Tokenizer.load(folder)
    assert not caplog.text
    (folder / "config.json").write_text(json.dumps({"vocab_size": 319}))
    Tokenizer.load(folder)
    assert "ids up to 319, the model those below 319" in caplog.text


def test_sentencepiece_tokens_as_bytes(tmp_path: Path) -> None:
    vocab = {"<unk>": 0, "<0xE2>": 1, "\u2581hi": 2, "<0x": 3}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocab, merges=[], byte_fallback=True, unk_token="<unk>"))
    backend.decoder = tokenizers.decoders.Sequence(
        [tokenizers.decoders.Replace("\u2581", " "), tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()]
    )
    found = Tokenizer(backend, tmp_path, {})
    assert [found.token_bytes(i) for i in (1, 2, 3)] == [b"\xe2", b" hi", b"<0x"]


def test_a_folder_without_a_tokenizer_says_so(tmp_path: Path) -> None:
    with pytest.raises(ParameterError, match=r"no tokenizer\.json"):
        Tokenizer.load(tmp_path)


def test_a_broken_tokenizer_says_so(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match=r"tokenizer\.json cannot be read"):
        Tokenizer.load(folder)


def test_a_tokenizer_json_needs_neither_transformers_nor_torch(tiny_folder: Path) -> None:
    """They take seconds to import."""
    code = f"""
import sys
from miniserve.text.tokenizer import Tokenizer
Tokenizer.load({str(tiny_folder)!r}).chat([{{"role": "user", "content": "<|im_end|>"}}])
assert sys.modules.keys().isdisjoint(["transformers", "torch"])
"""
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": str(Path(__file__).parents[2])})


def test_many_threads_share_a_tokenizer(tokenizer: Tokenizer) -> None:
    from concurrent.futures import ThreadPoolExecutor

    said = [[{"role": "user", "content": f"{i} <|im_end|>"}] for i in range(32)]
    expected = [tokenizer.chat(messages) for messages in said]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(tokenizer.chat, said)) == expected


@pytest.mark.parametrize("how", ["encode", "chat", pytest.param("forged", marks=pytest.mark.long), "decode"])
def test_long_texts_leave_other_threads_running(tokenizer: Tokenizer, how: str) -> None:
    """A thread that tokenizes must not hold the interpreter: the event loop streams to others meanwhile."""
    text = "hello the 你好 😀 " * 150_000
    said = [{"role": "user", "content": "<|im_end|>" * (how == "forged") + text}]
    ids = tokenizer.encode(text) * 8 if how == "decode" else []
    tokenizer.chat([{"role": "user", "content": "<|im_end|>"}])
    work = {"encode": lambda: tokenizer.encode(text), "decode": lambda: tokenizer.decode(ids)}
    thread = threading.Thread(target=work.get(how, lambda: tokenizer.chat(said)))
    began = before = time.perf_counter()
    thread.start()
    stalled = 0.0
    while thread.is_alive():
        time.sleep(0.001)
        now = time.perf_counter()
        stalled += now - before if now - before > 0.1 else 0
        before = now
    assert before - began > 0.2, "too quick to tell"
    assert stalled < (before - began) / 2
