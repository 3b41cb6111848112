"""Whatever the weights say, an output matches its grammar; and a grammar disturbs no request but its own."""

from __future__ import annotations

import asyncio
import json
import random
import re
import threading
import time
from typing import Any

import jsonschema
import pytest
from llguidance import LLParserLimits

from miniserve.cluster.messages import Ended, Failed, TurnOutput
from miniserve.llm import LLM
from miniserve.sampling_params import Grammar, ParameterError, SamplingParams
from miniserve.text import grammar
from miniserve.text.grammar import Compiler, GrammarError, json_grammar
from miniserve.worker.sequence import Sequence
from tests.e2e.test_cluster import cluster, collect, settled
from tests.support import tiny
from tests.support.engines import clean, small
from tests.support.schemas import PERSON, random_schema

pytestmark = pytest.mark.slow

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
    compiler = Compiler(llm.tokenizer)
    while len(schemas) < 200:
        schema = random_schema(pick)
        try:
            compiler.compile(json_grammar(schema, strict=True))
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
        assert isinstance(output, Failed)
        assert output.invalid
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
    assert isinstance(said["hard"][-1], Failed), "the library has learned to follow it: find a harder one"
    assert said["hard"][-1].invalid
    assert "too many" in said["hard"][-1].error
    assert said["hard"][0].tokens == [ord("x")]
    # From the library: the others' results are there, and so is what came before the failure.
    wanted = SamplingParams(max_tokens=200, grammar=hard), SamplingParams(max_tokens=50, ignore_eos=True)
    done = llm.generate(["hello"] * 2, [*wanted], progress=False)
    (failed,), (free,) = (output.outputs for output in done)
    assert (failed.finish_reason, failed.text[:1], len(free.token_ids), free.error) == (None, "x", 50, "")
    assert "too many" in failed.error
    assert clean(llm)


def test_a_turn_whose_grammar_is_being_compiled_delays_no_other(llm, monkeypatch):
    slow, go = Grammar("regex", "slow"), threading.Event()
    compile_ = llm.engine.grammars._compiler.result().compile

    def compile_slowly(wanted: Grammar) -> Any:
        if wanted == slow:
            go.wait(30)
        return compile_(wanted)

    monkeypatch.setattr(llm.engine.grammars._compiler.result(), "compile", compile_slowly)
    prompt = llm.tokenizer.encode("hello")
    llm.engine.add(Sequence("slow", prompt, SamplingParams(grammar=slow), 0, b""))
    llm.engine.add(Sequence("gone", prompt, SamplingParams(grammar=slow), 0, b""))
    llm.engine.add(Sequence("fast", prompt, SamplingParams(grammar=Grammar("regex", "fast")), 0, b""))
    llm.engine.add(Sequence("free", prompt, SamplingParams(max_tokens=9, ignore_eos=True), 0, b""))
    ended: set[str] = set()
    deadline = time.monotonic() + 20
    while ended != {"free"} and time.monotonic() < deadline:
        llm.engine.admit()
        ended |= {o.turn for o in llm.engine.step().outputs if isinstance(o, Ended)}
    assert ended == {"free"}, "both threads compile: that is all that waits"
    assert llm.engine.expecting
    llm.engine.abort("gone")
    go.set()
    said = run(llm)
    assert {name: llm.tokenizer.decode([t for o in outputs for t in o.tokens]) for name, outputs in said.items()} == {
        "slow": "slow",
        "fast": "fast",
    }
    assert not llm.engine.expecting
