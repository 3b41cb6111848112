"""Folders that are not quite a model: what is served of them, and the one line that the others end with."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from miniserve.config import ConfigError
from miniserve.llm import LLM
from miniserve.sampling_params import ParameterError, SamplingParams
from tests.support import tiny
from tests.support.engines import greedy, small

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 1234567\n"
Edit = Callable[[Path], object]
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_model(tmp_path_factory.mktemp("tied"), "llama", tie=True)


@pytest.fixture
def model(tied: Path, tmp_path: Path) -> Path:
    """A tied model in one file, to be spoiled."""
    return Path(shutil.copytree(tied, tmp_path / "model"))


@pytest.fixture
def sharded(tiny_models: dict[str, Path], tmp_path: Path) -> Path:
    """An untied model in several files and an index, to be spoiled."""
    return Path(shutil.copytree(tiny_models["llama3"], tmp_path / "sharded"))


def edit_tensors(edit: Callable[[Tensors], object], file: str = "model.safetensors") -> Edit:
    def run(folder: Path) -> None:
        tensors = load_file(folder / file)
        edit(tensors)
        save_file(tensors, folder / file, metadata={"format": "pt"})

    return run


def config(**values: object) -> Edit:
    """Sets keys of config.json, also to null; `...` takes one out."""

    def run(folder: Path) -> None:
        data = json.loads((folder / "config.json").read_text()) | values
        (folder / "config.json").write_text(json.dumps({key: value for key, value in data.items() if value is not ...}))

    return run


def both(*edits: Edit) -> Edit:
    return lambda folder: [edit(folder) for edit in edits]


def write(name: str, content: str | bytes = b"") -> Edit:
    def run(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return run


def without(*names: str) -> Edit:
    return lambda folder: [(folder / name).unlink() for name in names]


def cut(name: str, size: int) -> Edit:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def inside(name: str) -> Edit:
    def run(folder: Path) -> None:
        shutil.copytree(folder, folder.parent / "copy")
        shutil.rmtree(folder)
        shutil.move(folder.parent / "copy", folder / name)

    return run


def dangling(name: str) -> Edit:
    def run(folder: Path) -> None:
        (folder / name).unlink()
        (folder / name).symlink_to(folder / "blobs" / "0123")

    return run


def rename(**names: str) -> Callable[[Tensors], object]:
    def run(tensors: Tensors) -> None:
        for name in list(tensors):
            for old, new in names.items():
                if name.endswith(f".{old}"):
                    tensors[name.removesuffix(old) + new] = tensors.pop(name)

    return run


def to(dtype: torch.dtype, part: str = "") -> Callable[[Tensors], object]:
    return lambda tensors: tensors.update({k: v.to(dtype) for k, v in tensors.items() if part in k})


WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"

REFUSED: dict[str, tuple[Edit, list[str]]] = {
    # pointers, and what a download leaves
    "weights are a pointer": (write(WEIGHTS, POINTER), [WEIGHTS, "Git LFS pointer", "git lfs pull"]),
    "config is a pointer": (write("config.json", POINTER), ["config.json", "Git LFS pointer"]),
    "tokenizer is a pointer": (write("tokenizer.json", POINTER), ["tokenizer.json", "Git LFS pointer"]),
    "tokenizer_config is a pointer": (write("tokenizer_config.json", POINTER), ["Git LFS pointer"]),
    "weights are empty": (write(WEIGHTS), [WEIGHTS, "has 0 bytes that are no whole", "download"]),
    "weights are cut in the header": (cut(WEIGHTS, 100), [WEIGHTS, "no whole safetensors file", "download"]),
    "weights are cut in a tensor": (cut(WEIGHTS, 100_000), [WEIGHTS, "no whole safetensors file", "download"]),
    "weights are a page of a proxy": (write(WEIGHTS, "<!DOCTYPE html>" * 99), [WEIGHTS, "no whole safetensors file"]),
    "header is no JSON": (
        write(WEIGHTS, (64).to_bytes(8, "little") + b"x" * 99),
        [WEIGHTS, "no whole safetensors file"],
    ),
    "header is a list": (write(WEIGHTS, (2).to_bytes(8, "little") + b"[]"), [WEIGHTS, "no whole safetensors file"]),
    "weights are a broken link": (dangling(WEIGHTS), [WEIGHTS, "blobs/0123", "download"]),
    "config is a broken link": (dangling("config.json"), ["config.json", "blobs/0123"]),
    "a download has not ended": (
        both(without(WEIGHTS), write(".cache/huggingface/download/x/abc.incomplete")),
        ["no weights", "abc.incomplete"],
    ),
    # other formats
    "MLX": (
        both(config(quantization={"group_size": 64, "bits": 4}), edit_tensors(rename(weight="scales"))),
        ["quantized (MLX)"],
    ),
    "MLX, only told by tensors": (edit_tensors(lambda t: t.update({"model.x.scales": torch.ones(2)})), ["MLX"]),
    "GPTQ by its tensors alone": (edit_tensors(rename(weight="qweight")), ["quantized (GPTQ or AWQ", "plain version"]),
    "FP8, with scales": (edit_tensors(lambda t: t.update({"model.x.weight_scale_inv": torch.ones(2)})), ["FP8"]),
    "FP8, without": (edit_tensors(to(torch.float8_e4m3fn, "proj")), ["float8_e4m3fn", "bf16, fp16 and fp32"]),
    "integers": (edit_tensors(to(torch.int8, "q_proj")), ["int8", "q_proj"]),
    "a method without a name": (config(quantization_config={"bits": 4}), ["quantized (quantization_config, 4 bits)"]),
    "AWQ in name only": (
        config(quantization_config={"quant_method": "awq", "bits": 4, "version": "exllama"}),
        ["quantized (awq exllama, 4 bits)"],
    ),
    "an empty GGUF": (both(without(WEIGHTS), write("m.Q4_0.gguf")), ["m.Q4_0.gguf is no GGUF file"]),
    "a GGUF that is a pointer": (
        both(without(WEIGHTS, "config.json"), write("m.Q4_0.gguf", POINTER)),
        ["m.Q4_0.gguf is no GGUF file", "git lfs pull"],
    ),
    "pickled": (both(without(WEIGHTS), write("pytorch_model.bin")), ["only pytorch_model.bin", "convert"]),
    "pickled by its maker": (both(without(WEIGHTS), write("consolidated.00.pth")), ["only consolidated.00.pth"]),
    "ONNX": (both(without(WEIGHTS), write("onnx/model.onnx")), ["only model.onnx"]),
    "Mistral's own": (
        lambda folder: (folder / WEIGHTS).rename(folder / "consolidated.safetensors"),
        ["has consolidated.safetensors, but neither", "Hugging Face version"],
    ),
    "an adapter": (
        both(
            without(WEIGHTS, "config.json"),
            write("adapter_config.json", '{"base_model_name_or_path": "Big/Base"}'),
            write("adapter_model.safetensors"),
        ),
        ["adapter of Big/Base", "merge"],
    ),
    "an adapter beside a config": (
        both(without(WEIGHTS), write("adapter_config.json", '{"base_model_name_or_path": "Big/Base"}')),
        ["adapter of Big/Base", "merge"],
    ),
    # other models
    "an encoder": (
        both(config(architectures=["BertModel"], model_type="bert"), write("modules.json", "[]")),
        ["BertModel", "makes embeddings"],
    ),
    "a vision model": (
        config(architectures=["LlavaForConditionalGeneration"], model_type="llava", vision_config={}),
        ["is a LlavaForConditionalGeneration; miniserve serves"],
    ),
    "a folder above": (inside("weights"), ["no config.json", "model/weights, give that folder"]),
    "the hub's cache": (inside("snapshots/0123"), ["no config.json", "model/snapshots/0123, give that folder"]),
    "an empty folder": (lambda folder: [shutil.rmtree(folder), folder.mkdir()], ["no config.json", "give the folder"]),
    # config.json
    "config is empty": (write("config.json"), ["config.json cannot be read"]),
    "config is a list": (write("config.json", "[]"), ["config.json cannot be read: it is not a JSON object"]),
    "config is a folder": (lambda f: [(f / "config.json").unlink(), (f / "config.json").mkdir()], ["no config.json"]),
    "config is not UTF-8": (write("config.json", b"\xff\xfe{}"), ["config.json cannot be read"]),
    "architectures is a string": (config(architectures="LlamaForCausalLM"), ["`architectures` must be a list"]),
    "two models": (config(model_type="mamba"), ["contradicts itself", "'mamba'"]),
    "a string for a number": (config(hidden_size="128"), ["'hidden_size': '128'", "a whole number"]),
    "half a layer": (config(num_hidden_layers=1.5), ["'num_hidden_layers': 1.5", "whole number"]),
    "null heads": (config(num_attention_heads=None), ["no 'num_attention_heads'"]),
    "no heads": (config(num_attention_heads=0), ["'num_attention_heads': 0"]),
    "true layers": (config(num_hidden_layers=True), ["'num_hidden_layers': True"]),
    "heads that do not divide": (config(num_attention_heads=4, num_key_value_heads=3), ["4 heads", "3 of K and V"]),
    "a string for a flag": (config(tie_word_embeddings="true"), ["'tie_word_embeddings': 'true'", "true or false"]),
    "rope is a list": (config(rope_parameters=[1]), ["rope parameters [1]"]),
    "rope lacks its factor": (config(rope_parameters={"rope_type": "linear"}), ["no 'factor'"]),
    "rope for each kind of layer": (config(rope_parameters={"full_attention": {}}), ["one set for all layers"]),
    "yarn": (config(rope_scaling={"rope_type": "yarn", "factor": 4.0}), ["'yarn' is not supported", "take it out"]),
    "half rotary, scaled": (
        config(rope_scaling={"type": "linear", "factor": 4.0}, partial_rotary_factor=0.5),
        ["partial_rotary_factor 0.5"],
    ),
    "generation_config is a list": (write("generation_config.json", "[]"), ["generation_config.json cannot be read"]),
    # tensors
    "a smaller embedding": (config(vocab_size=400), [EMBEDDING, "(320, 128)", "(400, 128)", "do not belong"]),
    "a layer more": (config(num_hidden_layers=3), ["no tensor 'model.layers.2", "not complete"]),
    "no head, not tied": (config(tie_word_embeddings=False), [f"no tensor '{HEAD}'", "set tie_word_embeddings"]),
    "no head, nothing said": (config(tie_word_embeddings=...), [f"no tensor '{HEAD}'", "set tie_word_embeddings"]),
    "neither": (edit_tensors(lambda t: t.pop(EMBEDDING)), [f"no tensor '{EMBEDDING}'"]),
    "a head of another shape": (edit_tensors(lambda t: t.update({HEAD: torch.ones(10, 128)})), [HEAD, "(10, 128)"]),
    # the tokenizer
    "no tokenizer": (without("tokenizer.json"), ["no tokenizer.json", "download"]),
    "a broken tokenizer": (write("tokenizer.json", "{"), ["tokenizer.json cannot be read"]),
    "a tokenizer of another kind": (write("tokenizer.json", '{"a": 1}'), ["tokenizer.json cannot be read"]),
    "tokenizer_config is a list": (write("tokenizer_config.json", "[]"), ["tokenizer_config.json cannot be read"]),
    "a template that is no jinja": (write("chat_template.jinja", "{% if %}"), ["not valid jinja"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_wrong_folder_gets_one_line(model: Path, case: str) -> None:
    edit, said = REFUSED[case]
    edit(model)
    with pytest.raises((ConfigError, ParameterError)) as raised:
        small(model)
    message = str(raised.value)
    assert "\n" not in message
    assert [words for words in said if words not in message] == [], message


def test_shards(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    names = sorted(set(index["weight_map"].values()))
    (sharded / INDEX).unlink()
    with pytest.raises(ConfigError, match=f"has {names[0]}, but neither {WEIGHTS} nor {INDEX}"):
        small(sharded)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("model.safetensors", ["is a file: give the folder"]),
        ("config.json", ["is a file: give the folder"]),
        ("x" * 300, ["cannot be opened", "File name too long"]),
        ("m.gguf", ["m.gguf is no GGUF file"]),
        ("gone", ["a link to", "which is not there"]),
    ],
)
def test_what_is_no_folder(model: Path, name: str, said: list[str]) -> None:
    (model / "m.gguf").touch()
    (model / "gone").symlink_to(model / "nowhere")
    with pytest.raises(ConfigError) as raised:
        LLM(model / name)
    assert [words for words in said if words not in str(raised.value)] == [], raised.value


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("name", ["", "config.json", WEIGHTS, "tokenizer.json"])
def test_what_may_not_be_read_is_named(model: Path, name: str) -> None:
    (model / name).chmod(0)
    try:
        with pytest.raises((ConfigError, ParameterError), match=rf"{name} .*Permission denied"):
            small(model)
    finally:
        (model / name).chmod(0o700)


# --- served, as transformers does -----------------------------------------------------------------------------------


def flipped(tensors: Tensors) -> None:
    tensors[HEAD] = tensors[EMBEDDING].flip(0).contiguous()


def bare(tensors: Tensors) -> None:
    for name in [name for name in tensors if name.startswith("model.")]:
        tensors[name.removeprefix("model.")] = tensors.pop(name)


def stale(folder: Path) -> None:
    """Other weights under another name."""
    tensors = {name: tensor.flip(0).contiguous() for name, tensor in load_file(folder / WEIGHTS).items()}
    for name in ("adapter_model", "consolidated", "zzz", "model-00001-of-00002"):
        save_file(tensors, folder / f"{name}.safetensors")


SERVED: dict[str, tuple[Edit, str]] = {
    "nothing": (lambda folder: None, ""),
    "the same head": (edit_tensors(lambda t: t.update({HEAD: t[EMBEDDING].clone()})), ""),
    "another head": (edit_tensors(flipped), f"tie_word_embeddings, but the files have another {HEAD}"),
    "another head, not tied": (both(edit_tensors(flipped), config(tie_word_embeddings=False)), ""),
    "only the head": (edit_tensors(lambda t: t.update({HEAD: t.pop(EMBEDDING)})), ""),
    "no first part of names": (edit_tensors(bare), ""),
    "strays": (stale, "not read: adapter_model.safetensors, consolidated.safetensors, model-"),
    "an index beside the one file": (
        write(INDEX, '{"metadata": {}, "weight_map": {"x": "model-1.safetensors"}}'),
        f"not read: {INDEX}",
    ),
    "GGUF beside": (write("m.gguf", POINTER), ""),
    "an adapter beside": (write("adapter_config.json", "{}"), "not read: adapter_config.json"),
    "more tensors": (edit_tensors(lambda t: t.update({"model.layers.9.x": torch.ones(2)})), "no part of this model"),
    "Granite's keys": (config(embedding_multiplier=12.0), "embedding_multiplier 12.0"),
    "soft caps": (config(final_logit_softcapping=30.0), "final_logit_softcapping 30.0"),
    "half rotary": (config(partial_rotary_factor=0.5), "partial_rotary_factor 0.5"),
    "neutral keys": (config(residual_multiplier=1.0, attention_bias=False, partial_rotary_factor=1), ""),
    "dynamic rope": (config(rope_scaling={"type": "dynamic", "factor": 2.0}), "the first counts"),
    "two ropes": (config(rope_scaling={"type": "linear", "factor": 4.0}), "the first counts"),
    "rope of the old shape": (config(rope_parameters=..., rope_theta=500.0), ""),
    "llama3 without the old length": (
        config(rope_parameters={**tiny.LLAMA3, "rope_theta": 1e4, "original_max_position_embeddings": 64}),
        "",
    ),
    "llama3 with the old length outside": (
        config(rope_parameters={**tiny.LLAMA3, "rope_theta": 1e4}, original_max_position_embeddings=32),
        "",
    ),
    "another type": (config(architectures=["MistralForCausalLM"]), "it is taken for a LlamaForCausalLM"),
    "bf16 tensors of fp32": (edit_tensors(to(torch.bfloat16)), "dtype float32, the tensors are bfloat16"),
}


@pytest.mark.parametrize("case", SERVED)
def test_a_folder_is_served_as_transformers_does(model: Path, case: str, caplog: pytest.LogCaptureFixture) -> None:
    edit, said = SERVED[case]
    edit(model)
    prompts = tiny.prompts(3)
    with caplog.at_level(logging.WARNING, "miniserve"):
        llm = small(model)
    assert greedy(llm, prompts, 16) == tiny.reference(model, prompts, 16)
    lines = [record.getMessage() for record in caplog.records if record.name.startswith("miniserve")]
    assert any(said in line for line in lines) if said else not lines, lines


def test_a_tied_model_holds_one_matrix(model: Path) -> None:
    one = small(model)._built.facts.weights_bytes
    edit_tensors(lambda t: t.update({HEAD: t[EMBEDDING].clone()}))(model)
    assert small(model)._built.facts.weights_bytes == one
    edit_tensors(flipped)(model)
    assert small(model)._built.facts.weights_bytes == one + 320 * 128 * 4


def test_any_end_token_ends_a_turn(model: Path) -> None:
    """In the engine, too: of config.json, generation_config.json and the tokenizer's files each may name another."""
    (prompt,) = tiny.prompts(1)
    (text,) = tiny.reference(model, [prompt], 20)
    first = {token: place for place, token in reversed(list(enumerate(text)))}
    by_place = sorted(first, key=first.__getitem__)[4:7]
    backend = json.loads((model / "tokenizer.json").read_text())["model"]["vocab"]
    names = {token: name for name, token in backend.items()}
    for which in range(3):
        ends: list[object] = [319, 319, "<|im_end|>"]
        ends[which] = by_place[which] if which < 2 else names[by_place[which]]
        write("generation_config.json", json.dumps({"eos_token_id": [ends[0], 10**6]}))(model)
        config(eos_token_id=ends[1])(model)
        tiny.edit_json(model / "tokenizer_config.json", eos_token=ends[2])
        made = small(model).generate([prompt], SamplingParams(temperature=0, max_tokens=20), progress=False)
        assert made[0].outputs[0].finish_reason == "stop"
        assert made[0].outputs[0].token_ids == text[: first[by_place[which]] + 1]


def test_only_what_the_index_names_is_read(sharded: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Shards of an older revision beside those of the index, and a tensor in another shard than it says."""
    index = json.loads((sharded / INDEX).read_text())
    shards = sorted(set(index["weight_map"].values()))
    for number, name in enumerate(shards, 1):
        old = {key: tensor.flip(0).contiguous() for key, tensor in load_file(sharded / name).items()}
        save_file(old, sharded / f"model-{number:05}-of-00009.safetensors")
    index["weight_map"][EMBEDDING] = shards[-1]
    (sharded / INDEX).write_text(json.dumps(index))
    prompts = tiny.prompts(3)
    assert greedy(small(sharded), prompts, 16) == tiny.reference(sharded, prompts, 16)
    assert "not read: model-00001-of-00009.safetensors" in caplog.text


@pytest.mark.parametrize("dtypes", [("dtype",), ("torch_dtype",), ("dtype", "torch_dtype"), ()])
@pytest.mark.parametrize("tensors", [torch.bfloat16, torch.float16, torch.float32, "mixed"])
def test_the_dtype_is_transformers_auto(model: Path, tensors: torch.dtype | str, dtypes: tuple[str, ...]) -> None:
    import transformers

    edit_tensors(to(torch.bfloat16 if isinstance(tensors, str) else tensors))(model)
    if isinstance(tensors, str):
        edit_tensors(to(torch.float32, "norm"))(model)
    config(**{"dtype": ...} | dict(zip(dtypes, ("float16", "bfloat16"), strict=False)))(model)
    truth = transformers.AutoModelForCausalLM.from_pretrained(model, dtype="auto")
    assert small(model, dtype="auto")._built.model.dtype == truth.dtype


# --- the command ----------------------------------------------------------------------------------------------------


def started(folder: Path, *flags: str, **env: str) -> tuple[int, list[str]]:
    """The exit code of `miniserve serve`, and its lines but those that tell how far it is."""
    command = [sys.executable, "-m", "miniserve", "serve", str(folder), "--port", "0", "--threads", "1", *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ | env)
    return done.returncode, [line for line in done.stderr.splitlines() if not line.startswith("d0: ")]


@pytest.mark.parametrize("case", ["weights are a pointer", "a smaller embedding", "a broken tokenizer"])
def test_the_command_ends_with_that_line_alone(model: Path, case: str) -> None:
    edit, said = REFUSED[case]
    edit(model)
    code, lines = started(model)
    assert (code, len(lines)) == (1, 1), lines
    assert lines[0].startswith("miniserve: ")
    assert all(words in lines[0] for words in said)


@pytest.mark.parametrize(
    ("where", "module", "function"),
    [
        ("miniserve.worker", "miniserve.worker.sizing", "choose_device"),
        ("serve", "miniserve.cli.serve", "_http_server"),
    ],
)
def test_an_error_that_nobody_foresaw_is_a_line_too(
    model: Path, tmp_path: Path, where: str, module: str, function: str
) -> None:
    """In the worker or the frontend; with --log-level debug it says where."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        f"if {where!r} in sys.orig_argv:\n"
        f"    import {module} as module\n"
        f"    def {function}(*given):\n"
        "        raise ZeroDivisionError('of all\\nthings')\n"
        f"    module.{function} = {function}\n"
    )
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])
    code, lines = started(model, PYTHONPATH=path)
    assert (code, len(lines)) == (1, 1), lines
    assert "ZeroDivisionError: of all things" in lines[0]
    assert "--log-level debug" in lines[0]
    _, lines = started(model, "--log-level", "debug", PYTHONPATH=path)
    assert any(f"in {function}" in line for line in lines)
