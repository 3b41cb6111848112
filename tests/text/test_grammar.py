"""Structured output: whatever the weights say, the text matches; and a grammar disturbs nobody but its own request."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import re
import threading
import time
from typing import Any

import jsonschema
import pytest
from llguidance import LLParserLimits

from miniserve.api import structured
from miniserve.api.openai.schemas import CompletionRequest
from miniserve.api.structured import json_grammar, requested
from miniserve.cluster.messages import TurnOutput
from miniserve.hub import resolve as hub
from miniserve.llm import LLM
from miniserve.sampling_params import Grammar, ParameterError, SamplingParams
from miniserve.text import grammar
from miniserve.text.grammar import GrammarError, check_bounds, quoted
from miniserve.text.tokenizer import Tokenizer
from miniserve.worker.sequence import Sequence
from tests.api.test_openai import Api, error_of, make_app
from tests.e2e.test_cluster import cluster, collect, settled
from tests.e2e.test_parity import clean, small
from tests.support import tiny
from tests.support.fake_engine import EOS, FakeClient, spell
from tests.support.schemas import random_schema

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[A-Z][a-z]{2,8}$"},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["a", "b", "c"]}, "minItems": 2, "maxItems": 4},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
CASES = [
    (json_grammar(PERSON), lambda text: jsonschema.validate(json.loads(text), PERSON)),
    (Grammar("regex", r"(\d{3}-){2}[a-f]{4,6}"), lambda text: re.fullmatch(r"(\d{3}-){2}[a-f]{4,6}", text)),
    (Grammar("lark", 'start: "left" | "rechts" | "größer"'), lambda text: text in ("left", "rechts", "größer")),
    (
        Grammar("lark", 'start: "<call>" %json {"type": "integer", "minimum": 0, "maximum": 999} "</call>"'),
        lambda t: re.fullmatch(r"<call>.*</call>", t),
    ),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random model with room for long outputs."""
    return tiny.make_model(tmp_path_factory.mktemp("grammar") / "llama", "llama", tie=True, max_len=4096)


@pytest.fixture(scope="module")
def llm(folder) -> LLM:
    return small(folder, max_num_seqs=32, kv_cache_memory=2**24)


def texts(llm: LLM, wanted: list[Grammar], **params: Any) -> list[str]:
    """What the model says to the same prompt under each grammar; all must end by themselves."""
    all_params = [
        SamplingParams(**{"max_tokens": 400, "temperature": 1.0, "seed": i, **params}, grammar=g)
        for i, g in enumerate(wanted)
    ]
    outputs = [g.outputs[0] for g in llm.generate(["hello"] * len(wanted), all_params, progress=False)]
    assert [o.finish_reason for o in outputs] == ["stop"] * len(wanted)
    assert clean(llm)
    return [o.text for o in outputs]


def check(cases: list[tuple[Grammar, Any]], found: list[str]) -> None:
    for (_, matches), text in zip(cases, found, strict=True):
        assert matches(text) is not False, text


# --- what is generated ----------------------------------------------------------------------------------------------


def test_outputs_of_200_random_schemas_are_valid(llm, capsys):
    pick = random.Random(6)
    schemas: list[dict[str, Any]] = []
    refused: list[str] = []
    while len(schemas) < 200:
        schema = random_schema(pick)
        try:
            llm.tokenizer.compiler.compile(json_grammar(schema, strict=True))
            schemas.append(schema)
        except GrammarError as error:
            refused.append(str(error))
    params = [
        SamplingParams(temperature=i % 2 * 1.0, seed=i, max_tokens=800, grammar=json_grammar(schema, strict=True))
        for i, schema in enumerate(schemas)
    ]
    outputs = [g.outputs[0] for g in llm.generate(["hello"] * 200, params, progress=False)]
    cut = sum(o.finish_reason == "length" for o in outputs)
    for schema, output in zip(schemas, outputs, strict=True):
        if output.finish_reason == "stop":
            value = json.loads(output.text)
            checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
            jsonschema.validate(value, schema, jsonschema.Draft202012Validator, format_checker=checker)
    tokens = sum(len(o.token_ids) for o in outputs)
    with capsys.disabled():
        print(f"\n200 schemas: {200 - cut} valid, {cut} cut by length, {len(refused)} refused before, {tokens} tokens")
    assert cut <= 10
    assert len(refused) <= 20, refused
    assert clean(llm)


@pytest.mark.parametrize(
    "params", [{"temperature": 0.0}, {"top_k": 5, "top_p": 0.9, "min_p": 0.01, "logprobs": 3}], ids=str
)
def test_every_kind_greedy_and_sampled_with_and_without_overlap(folder, params):
    found = []
    for overlap in (False, True):
        llm = small(folder, async_scheduling=overlap, kv_cache_memory=2**23)
        found.append(texts(llm, [g for g, _ in CASES] * 4, **params))
        check(CASES * 4, found[-1])
    assert found[0] == found[1]


def test_others_in_the_batch_are_the_same(llm):
    free = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    alone = llm.generate("once", free, progress=False)[0].outputs[0].token_ids
    bound = SamplingParams(max_tokens=40, seed=1, grammar=CASES[1][0])
    together = llm.generate(["once", "hello", "once"], [free, bound, free], progress=False)
    assert [g.outputs[0].token_ids for g in (together[0], together[2])] == [alone, alone]


def test_a_preempted_turn_goes_on_where_it_was(folder, llm):
    wanted = [json_grammar({"type": "array", "items": {"type": "integer"}, "minItems": 60, "maxItems": 60})] * 6
    roomy = texts(llm, wanted, max_tokens=1500)
    tight = small(folder, kv_cache_memory=2**20, max_model_len=1024)
    assert texts(tight, wanted, max_tokens=900) == roomy
    assert tight.engine.counters.preemptions > 0
    assert all(len(json.loads(text)) == 60 for text in roomy)


@pytest.mark.parametrize("seen", [1, 5, 20])
def test_a_turn_that_starts_again_elsewhere_goes_on_from_its_outputs(llm, seen):
    params = SamplingParams(temperature=0.7, seed=4, max_tokens=300, grammar=CASES[0][0])
    (whole,) = llm.generate("hello", params, progress=False)
    outputs = whole.outputs[0].token_ids
    prompt = llm.tokenizer.encode("hello")
    llm.engine.add(Sequence("again", prompt + outputs[:seen], params, 4, b"", prior=seen))
    assert [t for o in run(llm)["again"] for t in o.tokens] == outputs[seen:]


def run(llm: LLM) -> dict[str, list[TurnOutput]]:
    """Until nothing is left; what each turn said."""
    said: dict[str, list[TurnOutput]] = {}
    while llm.engine.waiting or llm.engine.has_work:
        llm.engine.admit()
        for output in llm.engine.step().outputs:
            said.setdefault(output.turn, []).append(output)
    assert clean(llm)
    return said


async def test_handoffs_on_a_real_cluster(folder, llm):
    params = [SamplingParams(temperature=i % 2, seed=i, max_tokens=300, grammar=CASES[i % 4][0]) for i in range(12)]
    prompts = tiny.prompts(12, seed=4, shortest=60, longest=120)
    expected = [g.outputs[0].token_ids for g in llm.generate(prompts, params, progress=False)]
    async with cluster(folder, "1P1D", "conserve") as client:
        found = await asyncio.gather(*(collect(client, p, x) for p, x in zip(prompts, params, strict=True)))
        assert found == expected
        assert sum(h.count for h in client.scheduler.links.values()) == 12
        await settled(client)


# --- the end of an output -------------------------------------------------------------------------------------------


def test_only_an_end_may_follow_a_complete_output(llm):
    """Whatever the request says of ends: nothing else could come."""
    for params in (
        {},
        {"ignore_eos": True},
        {"min_tokens": 50},
        {"logit_bias": dict.fromkeys(llm.engine.runner.eos, -100.0)},
    ):
        assert texts(llm, [Grammar("regex", "abc")], **params) == ["abc"]


def test_min_tokens_holds_as_far_as_the_grammar_allows(llm):
    (text,) = texts(llm, [Grammar("regex", "[ab]{0,30}")], min_tokens=25, temperature=0.5)
    assert len(llm.tokenizer.encode(text)) >= 20
    assert texts(llm, [Grammar("regex", "a{0,3}")], min_tokens=25) == ["aaa"]


def test_logprobs_are_the_models_own(llm):
    def first(**params: Any) -> Any:
        asked = SamplingParams(temperature=0, max_tokens=1, logprobs=3, **params)
        return llm.generate("hello", asked, progress=False)[0].outputs[0].logprobs[0]

    free, bound = first(), first(grammar=Grammar("lark", 'start: "x"'))
    assert bound.top == free.top
    assert bound.rank > 1


# --- what goes wrong ------------------------------------------------------------------------------------------------


def test_a_bad_grammar_fails_alone(llm):
    good = SamplingParams(temperature=0, max_tokens=50, grammar=CASES[0][0])
    expected = llm.generate("hello", good, progress=False)[0].outputs[0].token_ids
    prompt = llm.tokenizer.encode("hello")
    llm.engine.add(Sequence("good", prompt, good, 0, b""))
    llm.engine.add(Sequence("bad", prompt, SamplingParams(grammar=Grammar("regex", "(")), 0, b""))
    llm.engine.add(Sequence("worse", prompt, SamplingParams(grammar=json_grammar({"type": "nothing"})), 0, b""))
    said = run(llm)
    assert [t for o in said["good"] for t in o.tokens] == expected
    for name in ("bad", "worse"):
        (output,) = said[name]
        assert (output.tokens, output.finish, output.invalid) == ([], "error", True)
    assert "unclosed group" in said["bad"][0].error
    with pytest.raises(ParameterError, match="unclosed group"):
        llm.generate("hello", SamplingParams(grammar=Grammar("regex", "(")), progress=False)


def test_a_grammar_that_turns_out_too_complex_ends_its_turn_alone(llm, monkeypatch):
    """It compiles, and its first tokens are fine."""
    monkeypatch.setattr(grammar, "_LIMITS", LLParserLimits(step_lexer_fuel=2_000, verbose_errors=False))
    hard = Grammar("regex", "xy(.*[a-m].{12}|.*[f-z].{15}|.*[a-z0-9].{18})+")
    prompt = llm.tokenizer.encode("hello")
    llm.engine.add(Sequence("hard", prompt, SamplingParams(max_tokens=200, grammar=hard), 0, b""))
    llm.engine.add(Sequence("free", prompt, SamplingParams(max_tokens=50, ignore_eos=True), 0, b""))
    said = run(llm)
    assert len(said["free"]) == 50
    assert said["hard"][-1].finish == "error", "the library has learned to follow it: find a harder one"
    assert said["hard"][-1].invalid
    assert "too many" in said["hard"][-1].error
    assert said["hard"][0].tokens == [ord("x")]


def test_a_turn_whose_grammar_is_being_compiled_holds_up_nobody(llm, monkeypatch):
    slow, go = Grammar("regex", "slow"), threading.Event()
    compile_ = llm.engine._grammars._compiler.result().compile

    def compile_slowly(wanted: Grammar) -> Any:
        if wanted == slow:
            go.wait(30)
        return compile_(wanted)

    monkeypatch.setattr(llm.engine._grammars._compiler.result(), "compile", compile_slowly)
    prompt = llm.tokenizer.encode("hello")
    llm.engine.add(Sequence("slow", prompt, SamplingParams(grammar=slow), 0, b""))
    llm.engine.add(Sequence("gone", prompt, SamplingParams(grammar=slow), 0, b""))
    llm.engine.add(Sequence("fast", prompt, SamplingParams(grammar=Grammar("regex", "fast")), 0, b""))
    llm.engine.add(Sequence("free", prompt, SamplingParams(max_tokens=9, ignore_eos=True), 0, b""))
    ended: set[str] = set()
    deadline = time.monotonic() + 20
    while ended != {"free"} and time.monotonic() < deadline:
        llm.engine.admit()
        ended |= {o.turn for o in llm.engine.step().outputs if o.finish}
    assert ended == {"free"}, "both threads compile: that is all that waits"
    assert llm.engine.compiling
    llm.engine.abort("gone")
    go.set()
    said = run(llm)
    assert {name: llm.tokenizer.decode([t for o in outputs for t in o.tokens]) for name, outputs in said.items()} == {
        "slow": "slow",
        "fast": "fast",
    }
    assert not llm.engine.compiling


def test_the_cache_is_bounded(llm, monkeypatch):
    compiler = grammar.Compiler(llm.tokenizer)
    monkeypatch.setattr(grammar, "MAX_CACHED", 3)
    monkeypatch.setattr(grammar, "MAX_CACHED_CHARS", 2000)
    for number in range(5):
        compiler.compile(Grammar("regex", f"a{number}"))
    assert [known.text for known in compiler._cache] == ["a2", "a3", "a4"]
    compiler.compile(Grammar("regex", "a" * 1999))
    assert len(compiler._cache) == 1


def nested(depth: int) -> Any:
    value: Any = {}
    for _ in range(depth):
        value = {"items": value}
    return value


TOO_MUCH = {
    "characters": Grammar("regex", "a" * 5000),
    "nested more than": json_grammar(nested(99)),
    "has 5000 properties": json_grammar({"properties": {f"p{i}": {} for i in range(5000)}}),
    "has 600 `patternProperties`": json_grammar({"patternProperties": {f"^x{i}y.*$": {} for i in range(600)}}),
    "`multipleOf`": json_grammar({"allOf": [{"type": "integer", "multipleOf": k} for k in (97, 89, 83)]}),
    "combines patterns": json_grammar({"allOf": [{"type": "string", "pattern": f".*{i}.*"} for i in range(40)]}),
    "a pattern has more than": json_grammar({"type": "string", "pattern": "a" * 1025}),
    "least common": Grammar("lark", 'start: "x" %json {"type": "integer", "multipleOf": 9999991}'),
    "its rules have": Grammar("lark", "start: " + '"a" ' * 40000),
    "operators & and ~": Grammar("lark", "start: T\nT: /.*a.{15}.*/ & /.*b.{15}.*/ & ~/.*c.{17}.*/\n"),
    "not valid JSON": Grammar("lark", "start: %json // not {\n{}"),
}


@pytest.mark.parametrize("reason", TOO_MUCH)
def test_what_the_library_does_not_bound_is_refused_at_once(llm, reason):
    started = time.perf_counter()
    with pytest.raises(GrammarError, match=reason):
        check_bounds(TOO_MUCH[reason])
    assert time.perf_counter() - started < 0.5


def many_schemas(count: int, schema: dict[str, Any]) -> Grammar:
    """As where one of many tools has to be called."""
    rules = (f"j{i}: %json {json.dumps(schema)}" for i in range(count))
    return Grammar("lark", "\n".join([f"start: {' | '.join(f'j{i}' for i in range(count))}", *rules]))


@pytest.mark.parametrize("text", ['"' + '\\"' * 8000, "/" + "\\/" * 8000, '"\\' * 8000, '"\n' * 8000])
def test_bounds_are_checked_in_no_time(tokenizer, text):
    """Python's searches let no other thread run."""
    started = time.perf_counter()
    with contextlib.suppress(GrammarError):
        check_bounds(Grammar("lark", text))
    assert time.perf_counter() - started < 0.2
    with pytest.raises(GrammarError):
        tokenizer.compiler.compile(Grammar("lark", f"start: {text}"))


@pytest.mark.parametrize(
    "hidden", ['T: "a" & /b/', 'T: /x"/ & /b/', 'T: "a" // "\n  & /b/', "T: /[/ ~ /b/", 'T: "\\"" & "']
)
def test_operators_do_not_hide(hidden):
    with pytest.raises(GrammarError, match="operators"):
        check_bounds(Grammar("lark", f"start: T\n{hidden}\n"))
    check_bounds(Grammar("lark", 'start: T\nT: "&" // ~\n | /&[~]/ # &'))


CATASTROPHES = [
    Grammar("regex", "((a{1,100}){1,100}){1,100}"),
    Grammar("regex", "(a+)+(a+)+(a+)+$"),
    Grammar("regex", "(.*[a-m].{12}|.*[f-z].{15}|.*[a-z0-9].{18})+"),
    Grammar("regex", "(" * 2000 + "a" + ")" * 2000),
    Grammar("regex", r"\p{L}{1,500}(\p{Lu}|\p{N}){30,500}"),
    Grammar("lark", 'start: e\ne: e e | e e e | /[a-z]/ | /[a-m]+/ | ""\n'),
    Grammar("lark", "start: " + "(" * 500 + '"a"' + ")" * 500),
    json_grammar({"properties": {f"p{i}": {"type": "string"} for i in range(1000)}}),
    json_grammar({"allOf": [{"anyOf": [{"properties": {f"{i}_{j}": {}}} for j in range(5)]} for i in range(12)]}),
    json_grammar({"$ref": "#"}),
    json_grammar({"patternProperties": {"a.{15}$": {}}, "additionalProperties": {"type": "null"}}),
    json_grammar({"allOf": [{"type": "string", "pattern": f"{c}.{{15}}$"} for c in "abc"]}),
    json_grammar({"type": "array", "items": {"type": "integer"}, "minItems": 10**9}),
    json_grammar({"type": "string", "pattern": "^(([a-z])+.)+[A-Z]([a-z])+$", "minLength": 100, "maxLength": 2000}),
    json_grammar({"enum": [f"v{i * 31}" for i in range(5000)]}),
    json_grammar({"patternProperties": {f"^x{i}y.*$": {} for i in range(32)}}),
    many_schemas(100, {"patternProperties": {f"^x{i}y.*$": {} for i in range(32)}}),
    many_schemas(160, {"properties": {f"p{i}": {"type": "string", "pattern": "^(a.*|b.*)x$"} for i in range(30)}}),
]


@pytest.mark.parametrize("wanted", CATASTROPHES, ids=lambda g: g.text[:30])
def test_catastrophes_compile_or_fail_in_time(tokenizer, wanted):
    started = time.perf_counter()
    with contextlib.suppress(GrammarError):
        tokenizer.compiler.compile(wanted)
    assert time.perf_counter() - started < 3


@pytest.mark.parametrize(
    "text", ['a"b\\c', "новый", "tab\there\nnl", "/x/", "😀 ü", "\x01\x7f", "\\d+", "${x}", "%json {"]
)
def test_quoted_text_is_itself(tokenizer, text):
    matcher = tokenizer.compiler.compile(Grammar("lark", f"start: {quoted(text)}"))
    assert matcher.consume_tokens(tokenizer.encode(text))
    assert matcher.is_accepting()
    assert matcher.is_stopped()


# --- the API --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(hub.resolve("smollm2-135m", load_format="dummy").folder)


@pytest.fixture
def api(tokenizer: Tokenizer) -> Api:
    engine = FakeClient(steps=[*spell("Hello"), [EOS]], stop_token=EOS)
    return Api(make_app(tokenizer, engine), engine)


def fits(tokenizer: Tokenizer, wanted: Grammar, text: str) -> bool:
    matcher = tokenizer.compiler.compile(wanted)
    return matcher.consume_tokens(tokenizer.encode(text)) and matcher.is_accepting()


GOOD_REQUESTS = [
    ({"response_format": {"type": "json_object"}}, '{"a": [1, 2],\n  "b": {}}', "[1]"),
    ({"response_format": {"type": "json_schema", "json_schema": {"name": "p", "schema": PERSON, "strict": True}}},
     '{"name": "Anna", "age": 3, "tags": ["a", "b"]}', '{"name": "Anna"}'),
    ({"structured_outputs": {"json": {"type": "integer"}}}, "12", "x"),
    ({"structured_outputs": {"json": '{"type": "integer"}'}}, "12", "x"),
    ({"structured_outputs": {"json": {"oneOf": [{"type": "integer"}, {"minimum": 3}]}}}, "12", "x"),
    ({"structured_outputs": {"json_object": True}}, "{}", "1"),
    ({"structured_outputs": {"regex": "a+/b"}}, "aa/b", "ba"),
    ({"structured_outputs": {"choice": ["yes", 'n"o']}}, 'n"o', "maybe"),
    ({"structured_outputs": {"grammar": 'root ::= "a" | "b" root'}}, "bba", "bbc"),
    ({"structured_outputs": {"grammar": 'start: "a" X\nX: /[0-9]+/'}}, "a12", "a"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "good", "bad"), GOOD_REQUESTS, ids=str)
async def test_formats_reach_the_engine(api, tokenizer, body, good, bad):
    for answer in (await api.chat(**body), await api.complete(**body)):
        assert answer.status_code == 200, answer.text
    for turn in api.engine.turns:
        assert fits(tokenizer, turn.params.grammar, good)
        assert not fits(tokenizer, turn.params.grammar, bad)


@pytest.mark.parametrize("blank", ["\n", "\n ", "\r\n", " \t"])
def test_empty_lines_take_no_time(blank):
    """It runs in a thread, but Python's searches let no other one run."""
    for text in ('root ::= "a"', 'start: "a"'):
        for spaced in (text + "\n" + blank * 8000, blank * 5000 + "\n" + text):
            request = CompletionRequest(prompt="Hi", structured_outputs={"grammar": spaced})
            started = time.perf_counter()
            found = requested(request)
            assert time.perf_counter() - started < 0.2
            assert 'start: "a"' in found.text


async def test_text_is_no_format(api):
    assert (await api.chat(response_format={"type": "text"})).status_code == 200
    assert api.engine.turns[0].params.grammar is None


def schema_format(schema: Any, **more: Any) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, **more}}}


@pytest.mark.parametrize(
    ("body", "param", "part"),
    [
        ({"structured_outputs": {"regex": "("}}, "structured_outputs", "unclosed group"),
        ({"structured_outputs": {"regex": "a(?=b)"}}, "structured_outputs", "look-around"),
        ({"structured_outputs": {"regex": "[a&&b]"}}, "structured_outputs", "cannot be followed"),
        ({"structured_outputs": {"regex": "a" * 5000}}, "structured_outputs", "at most 4096"),
        ({"structured_outputs": {"grammar": "start: nothing"}}, "structured_outputs", "nothing"),
        ({"structured_outputs": {"grammar": "@@@"}}, "structured_outputs", ""),
        ({"structured_outputs": {"grammar": "a" * 20000}}, "structured_outputs.grammar", "at most 16384"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs", "not JSON"),
        ({"structured_outputs": {"json": "[" * 100000}}, "structured_outputs", "not JSON"),
        ({"structured_outputs": {"json": "3"}}, "structured_outputs", "an object"),
        ({"structured_outputs": {}}, "structured_outputs", "exactly one"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs", "exactly one"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice", "at least 1"),
        ({"structured_outputs": {"regex": "a"}, **schema_format({})}, "structured_outputs", "both"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "json_schema"),
        ({"response_format": {"type": "json_schema"}}, "response_format", "needs `json_schema`"),
        (schema_format({"type": "nothing"}), "response_format", "nothing"),
        (schema_format({"oneOf": [{"minimum": 1}, {"maximum": 2}]}, strict=True), "response_format", "oneOf"),
        (schema_format({"properties": {"a": {"if": {}, "then": {}}}}), "response_format", "if"),
        (schema_format({"$ref": "http://169.254.169.254/"}), "response_format", "169.254"),
        (schema_format({"properties": {f"p{i}": {} for i in range(2000)}}), "response_format", "2000 properties"),
        (schema_format(nested(90)), "response_format", "levels deep"),
        (schema_format({"enum": ["x" * 70000]}), "response_format", "at most 65536"),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
async def test_what_is_wrong_is_told(api, body, param, part):
    for answer in (await api.chat(**body), await api.complete(**body)):
        error = error_of(answer, 400)
        assert error["param"] == param, error
        assert part in error["message"]
        assert len(error["message"]) < 800
    assert not api.engine.turns


async def test_a_slow_compilation_stops_neither_the_loop_nor_others(api, monkeypatch):
    monkeypatch.setattr(grammar, "MAX_MULTIPLE", 10**9)
    monkeypatch.setattr(structured, "SECONDS", 0.1)
    assert (await api.chat(structured_outputs={"regex": "warm"})).status_code == 200
    worst, last = 0.0, time.perf_counter()

    async def beat() -> None:
        nonlocal worst, last
        while True:
            await asyncio.sleep(0.001)
            worst, last = max(worst, time.perf_counter() - last), time.perf_counter()

    beating = asyncio.create_task(beat())
    slow = [schema_format({"type": "integer", "multipleOf": k}) for k in (500009, 500029, 500041, 500057)]
    answers = await asyncio.gather(*(api.chat(**body) for body in slow))
    beating.cancel()
    told = sorted((a.status_code, a.json()["error"]["code"]) for a in answers if a.status_code != 200)
    assert (400, None) in [(status, code) for status, code in told], "two are being compiled"
    assert (503, "queue_full") in told, "the others have not begun"
    assert worst < 0.3, "the loop goes on"


async def test_a_grammar_that_fails_later_is_the_requests_fault(tokenizer):
    engine = FakeClient(steps=[*spell("{"), []], finish="error", error="The grammar is too complex.", invalid=True)
    api = Api(make_app(tokenizer, engine), engine)
    assert "too complex" in error_of(await api.chat(), 400)["message"]
    lines = (await api.chat(stream=True)).text.split("\n\n")
    assert any("too complex" in line and "invalid_request_error" in line for line in lines)
