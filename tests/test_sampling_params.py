"""Bounds of sampling parameters: every integer, list and float of a request has one."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest

from miniserve.sampling_params import ParameterError, SamplingParams

GOOD = [
    {},
    {"n": 64, "temperature": 0, "top_k": -1, "top_p": 1e-6, "min_p": 1, "seed": -(2**63)},
    {"n": 1, "temperature": 100, "top_k": 2**31 - 1, "top_p": 1, "min_p": 0, "seed": 2**63 - 1},
    {"repetition_penalty": 100, "presence_penalty": -2, "frequency_penalty": 2},
    {"max_tokens": None, "min_tokens": 2**31 - 1},
    {"max_tokens": 1, "min_tokens": 1, "logprobs": 0},
    {"logprobs": 20, "stop": ["x" * 1024] * 16, "stop_token_ids": [0] * 128},
    {"logit_bias": {i: 100.0 if i % 2 else -100.0 for i in range(1024)}},
]
BAD: list[tuple[str, Any]] = [
    ("n", 0),
    ("n", 65),
    ("temperature", -0.1),
    ("temperature", 100.1),
    ("temperature", math.nan),
    ("temperature", math.inf),
    ("top_k", -2),
    ("top_k", 2**31),
    ("top_p", 0),
    ("top_p", 1.1),
    ("top_p", math.nan),
    ("min_p", -0.1),
    ("min_p", 1.1),
    ("min_p", math.nan),
    ("seed", 2**63),
    ("seed", -(2**63) - 1),
    ("repetition_penalty", 0),
    ("repetition_penalty", 101),
    ("repetition_penalty", math.inf),
    ("presence_penalty", -2.1),
    ("presence_penalty", 2.1),
    ("frequency_penalty", -2.1),
    ("frequency_penalty", 2.1),
    ("frequency_penalty", math.nan),
    ("max_tokens", -1),
    ("max_tokens", 2**31),
    ("min_tokens", -1),
    ("min_tokens", 17),  # above the default max_tokens
    ("logprobs", -1),
    ("logprobs", 21),
    ("prompt_logprobs", -1),
    ("prompt_logprobs", 21),
    ("stop", ["x"] * 17),
    ("stop", ["x", ""]),
    ("stop", ["x" * 1025]),
    ("stop_token_ids", [1] * 129),
    ("logit_bias", dict.fromkeys(range(1025), 0.0)),
    ("logit_bias", {1: 100.1}),
    ("logit_bias", {1: -100.1}),
    ("logit_bias", {1: math.nan}),
]


@pytest.mark.parametrize("values", GOOD)
def test_values_within_bounds_pass(values: dict[str, Any]) -> None:
    params = SamplingParams(**values)
    assert params.validate() is params


@pytest.mark.parametrize(("name", "value"), BAD)
def test_values_out_of_bounds_are_named(name: str, value: Any) -> None:
    with pytest.raises(ParameterError, match=f"^`{name}` must be ") as raised:
        SamplingParams(**{name: value}).validate()
    assert raised.value.param == name
    assert raised.value.message == str(raised.value)


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("n", True, "int"),
        ("temperature", "0.5", "float"),
        ("temperature", None, "float"),
        ("top_k", 5.0, "int"),
        ("seed", "1", "int | null"),
        ("logit_bias", {"5": 1.0}, "made of int"),
        ("logit_bias", [5], "object"),
        ("max_tokens", "5", "int | null"),
        ("stop", None, "str | array"),
        ("stop", ["a", 1], "made of str"),
        ("stop", b"END", "str | array"),
        ("stop_token_ids", 5, "array"),
        ("ignore_eos", "no", "bool"),
    ],
)
def test_values_of_a_wrong_type_are_named(name: str, value: Any, kind: str) -> None:
    with pytest.raises(ParameterError) as raised:
        SamplingParams(**{name: value}).validate()
    assert raised.value.param == name
    assert raised.value.message == f"`{name}` must be {kind}, got {value!r}."


def test_every_parameter_with_a_bound_is_tested() -> None:
    flags = {"ignore_eos", "skip_special_tokens", "include_stop_str_in_output"}
    elsewhere = {"grammar"}  # llguidance knows what it takes
    assert {name for name, _ in BAD} == set(SamplingParams.__struct_fields__) - flags - elsewhere


@pytest.mark.parametrize(("name", "wrap"), [("logit_bias", lambda t: {t: 1.0}), ("stop_token_ids", lambda t: [t])])
def test_token_ids_lie_within_the_vocabulary(name: str, wrap: Any) -> None:
    for good in (0, 9):
        SamplingParams(**{name: wrap(good)}).validate(vocab_size=10)
    for bad in (-1, 10):
        with pytest.raises(ParameterError, match="from 0 to 9"):
            SamplingParams(**{name: wrap(bad)}).validate(vocab_size=10)


def test_max_tokens_none_leaves_min_tokens_free() -> None:
    SamplingParams(max_tokens=None, min_tokens=1000).validate()
    with pytest.raises(ParameterError, match=r"at most `max_tokens` \(5\)"):
        SamplingParams(max_tokens=5, min_tokens=6).validate()


@pytest.mark.parametrize(("temperature", "greedy"), [(0.0, True), (1e-6, True), (1e-5, False), (1.0, False)])
def test_tiny_temperatures_are_greedy(temperature: float, greedy: bool) -> None:
    assert SamplingParams(temperature=temperature).greedy is greedy


def test_one_stop_string_is_a_list_of_one() -> None:
    params = SamplingParams(stop="END")
    assert params == SamplingParams(stop=["END"]) == params.validate()
    assert msgspec.structs.replace(params, stop="\n").stop == ["\n"]
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(params)) == {"stop": ["END"]}
    with pytest.raises(ParameterError, match="made of str of length >= 1"):
        SamplingParams(stop="").validate()


@pytest.mark.parametrize(
    ("seed", "seeds"),
    [(None, [None] * 3), (5, [5, 6, 7]), (-1, [-1, 0, 1]), (2**63 - 2, [2**63 - 2, 2**63 - 1, -(2**63)])],
)
def test_each_choice_has_a_seed_of_its_own(seed: int | None, seeds: list[int | None]) -> None:
    params = SamplingParams(n=3, seed=seed, top_k=5)
    choices = [params.nth(i).validate() for i in range(3)]
    assert [choice.seed for choice in choices] == seeds
    assert all(msgspec.structs.replace(choice, seed=seed) == params for choice in choices)


def test_defaults_do_not_travel() -> None:
    assert msgspec.json.encode(SamplingParams(top_k=5)) == b'{"top_k":5}'
    assert msgspec.json.decode(b"{}", type=SamplingParams) == SamplingParams()


def test_one_candidate_is_greedy() -> None:
    assert SamplingParams(temperature=0.8, top_k=1).greedy
    assert not SamplingParams(temperature=0.8, top_k=2).greedy
