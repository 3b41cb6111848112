"""Streamed text: cut at the earliest stop however it is cut into tokens, never a part of one, only whole characters."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import Any, cast

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from miniserve.sampling_params import SamplingParams
from miniserve.text.detokenizer import IncrementalDetokenizer
from miniserve.text.tokenizer import Tokenizer

# Few letters, so that stop strings overlap themselves and one another; 1 to 4 bytes long.
LETTERS = st.sampled_from("aab é你😀")
TEXT = st.text(LETTERS, max_size=24)
STOPS = st.lists(st.text(LETTERS, min_size=1, max_size=5), min_size=1, max_size=4)
CUTS = st.lists(st.integers(0, 60), max_size=12)


@st.composite
def texts_with_stops(draw: st.DrawFn) -> tuple[str, list[str]]:
    """A text, and stop strings of which some occur in it."""
    text, stops = draw(TEXT), draw(STOPS)
    for start in draw(st.lists(st.integers(0, 23), max_size=3)):
        if found := text[start : start + draw(st.integers(1, 6))]:
            stops.append(found)
    return text, stops


class Tokens:
    """What a stream needs of a tokenizer: token i stands for `tokens[i]`."""

    def __init__(self, tokens: Iterable[bytes], special: Iterable[int] = ()) -> None:
        self.tokens = list(tokens)
        self.special_ids = frozenset(special)

    def token_bytes(self, token: int) -> bytes:
        return self.tokens[token]


def cut(data: bytes, cuts: list[int]) -> list[bytes]:
    """`data` cut at any bytes, also within characters; some of the pieces may be empty."""
    ends = [0, *sorted(min(at, len(data)) for at in cuts), len(data)]
    return [data[a:b] for a, b in pairwise(ends)]


def stream(tokens: Tokens, stop: list[str] | None = None, **how: Any) -> IncrementalDetokenizer:
    return IncrementalDetokenizer(cast(Tokenizer, tokens), SamplingParams(stop=stop or [], **how))


def completed_by(tokens: list[bytes], text: str) -> int:
    """The number of tokens it takes to have all of `text`, which `tokens` begin with."""
    length, done = len(text.encode()), 0
    for number, token in enumerate(tokens, 1):
        done += len(token)
        if done >= length:
            return number
    raise AssertionError("not a beginning")


def first_stop(tokens: list[bytes], stops: list[str], min_tokens: int = 0) -> tuple[int, str] | None:
    """(end in characters, stop) of the stop that ends first, of those the longest, by looking at every beginning."""
    text = b"".join(tokens).decode()
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found and completed_by(tokens, text[:end]) > min_tokens:
            return end, max(found, key=len)
    return None


@given(case=texts_with_stops(), cuts=CUTS, include=st.booleans(), min_tokens=st.integers(0, 4))
@settings(max_examples=500)
@example(case=("aab", ["aab", "ab", "b"]), cuts=[1, 2], include=False, min_tokens=0)
@example(case=("aaa", ["aa"]), cuts=[1, 2], include=False, min_tokens=2)
@example(case=("😀😀a", ["😀a"]), cuts=[1, 2, 3, 5, 7], include=True, min_tokens=0)
def test_the_text_ends_at_the_earliest_stop(
    case: tuple[str, list[str]], cuts: list[int], include: bool, min_tokens: int
) -> None:
    text, stops = case
    tokens = cut(text.encode(), cuts)
    expected, used, stopped = text, len(tokens), None
    if found := first_stop(tokens, stops, min_tokens):
        end, stopped = found
        expected, used = text[: end if include else end - len(stopped)], completed_by(tokens, text[:end])

    out = stream(Tokens(tokens), stops, include_stop_str_in_output=include, min_tokens=min_tokens)
    given_out = ""
    for token in range(len(tokens)):
        given_out += out.push([token])
        assert expected.startswith(given_out), "what was given out cannot be taken back"
    given_out += out.flush()
    assert given_out == expected
    assert (out.stop_reason, out.tokens_used) == (stopped, used)


@given(case=texts_with_stops(), cuts=CUTS, data=st.data())
def test_pushing_many_tokens_at_once_is_the_same(
    case: tuple[str, list[str]], cuts: list[int], data: st.DataObject
) -> None:
    text, stops = case
    tokens = Tokens(cut(text.encode(), cuts))
    count = len(tokens.tokens)
    one, many = stream(tokens, stops), stream(tokens, stops)
    singly = "".join(one.push([token]) for token in range(count)) + one.flush()
    at = data.draw(st.integers(0, count))
    assert many.push(range(at)) + many.push(range(at, count)) + many.flush() == singly
    assert (many.stop_reason, many.tokens_used) == (one.stop_reason, one.tokens_used)


@given(case=texts_with_stops(), cuts=CUTS)
def test_no_more_is_held_back_than_must_be(case: tuple[str, list[str]], cuts: list[int]) -> None:
    text, stops = case
    tokens = cut(text.encode(), cuts)
    out = stream(Tokens(tokens), stops)
    given_out, data = "", b""
    for token, raw in enumerate(tokens):
        given_out += out.push([token])
        data += raw
        if out.finish == "stop":
            return
        whole = data.decode("utf-8", "ignore")  # without the unfinished character
        held = whole.removeprefix(given_out)
        assert given_out + held == whole
        beginnings = [whole[at:] for at in range(len(whole)) if any(stop.startswith(whole[at:]) for stop in stops)]
        assert held == max(beginnings, key=len, default="")


@given(data=st.binary(max_size=24), cuts=CUTS, stops=st.none() | STOPS)
def test_bytes_that_are_no_utf8_read_like_python_reads_them(
    data: bytes, cuts: list[int], stops: list[str] | None
) -> None:
    tokens = cut(data, cuts)
    out = stream(Tokens(tokens), stops)
    text = "".join(out.push([token]) for token in range(len(tokens))) + out.flush()
    whole = data.decode("utf-8", "replace")
    ends = [whole.find(stop) for stop in stops or [] if stop in whole]
    if not ends:
        assert text == whole
    else:
        assert whole.startswith(text)
        assert out.finish == "stop"


def test_an_unfinished_character_is_given_out_at_the_end_only() -> None:
    out = stream(Tokens([b"a\xe4", b"\xbd"]))
    assert [out.push([0]), out.push([1]), out.flush()] == ["a", "", "\ufffd"]


def test_nothing_comes_after_a_stop() -> None:
    out = stream(Tokens([b"ab", b"c", b"d"]), ["b"])
    assert [out.push([0, 1]), out.push([2]), out.flush()] == ["a", "", ""]
    assert out.tokens_used == 1


def test_the_beginning_of_a_stop_comes_out_when_it_goes_on_otherwise() -> None:
    out = stream(Tokens([b"one", b"\nUs", b"er", b"s"]), ["\nUser:"])
    assert [out.push([t]) for t in range(4)] == ["one", "", "", "\nUsers"]


def test_a_stop_begun_within_min_tokens_counts_when_it_ends_after_them() -> None:
    out = stream(Tokens([b"x", b"E", b"ND", b"END"]), ["END"], min_tokens=2)
    assert out.push([0, 1, 2, 3]) == "x"
    late = stream(Tokens([b"x", b"E", b"ND", b"END"]), ["END"], min_tokens=3)
    assert late.push([0, 1, 2, 3]) == "xEND"
    assert late.tokens_used == 4


@pytest.mark.parametrize(("skip", "text"), [(True, "ab"), (False, "a<|end|>b")])
def test_special_tokens_are_left_out_or_shown(skip: bool, text: str) -> None:
    out = stream(Tokens([b"a", b"<|end|>", b"b"], special=[1]), skip_special_tokens=skip)
    assert out.push([0, 1, 2]) == text
    assert out.tokens_used == 3


def test_hidden_special_tokens_hold_no_stop() -> None:
    tokens = Tokens([b"a", b"<|end|>", b"b"], special=[1])
    assert stream(tokens, ["end"]).push([0, 1, 2]) == "ab"
    assert stream(tokens, ["end"], skip_special_tokens=False).push([0, 1, 2]) == "a<|"


def test_a_long_stop_that_nearly_matches_everywhere() -> None:
    # Compared afresh at every character this would be 10^9 steps, and pytest's time limit would end it.
    text = "a" * 200_000
    stop = "a" * 1023 + "b"
    out = stream(Tokens([text.encode(), b"b", b"c"]), [stop] * 4)
    assert out.push([0, 1, 2]) == text[:-1023]
