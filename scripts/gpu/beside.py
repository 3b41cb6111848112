"""The benchmark of 256 sequences, and transformers' continuous batching beside it."""

from __future__ import annotations

import random
import time
from typing import Any

import torch

from miniserve.llm import LLM
from miniserve.sampling_params import SamplingParams
from scripts.gpu.common import drop_engine, model_folder
from scripts.gpu.setting import Figure, Figures, Setting

TIMES_TRANSFORMERS = 5.0
"""How many times faster than transformers' continuous batching the 256-sequence benchmark must be."""
WARM_SECONDS, BASELINE_SECONDS = 5.0, 10.0
"""What transformers gets at most, 15 in all: its rate shows long before its end."""


def benchmark_requests(run: Setting) -> tuple[list[list[int]], list[int]]:
    """nano-vllm's bench.py: prompts and lengths of outputs, 100 to 1,024 tokens each, ids below 10,000."""
    pick = random.Random(0)
    count, low, high, ids = (8, 10, 32, 1000) if run.small else (256, 100, 1024, 10000)
    prompts = [[pick.randint(0, ids) for _ in range(pick.randint(low, high))] for _ in range(count)]
    return prompts, [pick.randint(low, high) for _ in range(count)]


def benchmark(run: Setting) -> Figures:
    """256 sequences at once, drawn at temperature 0.6 as there; output tokens a second, Qwen3-0.6B's shape."""
    drop_engine(run)
    settings: dict[str, Any] = {"load_format": "dummy", "device": run.device, "max_model_len": 4096}
    settings |= {"kv_cache_memory": 2**26, "threads": 1} if run.small else {"dtype": "bfloat16"}
    llm = LLM(model_folder(run, "qwen3-0.6b"), **settings)
    prompts, lengths = benchmark_requests(run)

    def generate(items: list[list[int]], outputs: list[int]) -> float:
        params = [SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=n, seed=i) for i, n in enumerate(outputs)]
        begun = time.perf_counter()
        answers = llm.generate(items, params, progress=False)
        taken = time.perf_counter() - begun
        if [len(answer.outputs[0].token_ids) for answer in answers] != outputs:
            raise RuntimeError("an answer has another length than asked for")
        return taken

    # Other prompts of as many sequences first, which end one after the other: graphs of all sizes are captured.
    warm = generate([[token + 1 for token in p[:32]] for p in prompts], [2 + i // 4 for i in range(len(prompts))])
    yield Figure("warm-up", warm, "s")
    taken = generate(prompts, lengths)
    rate = sum(lengths) / taken
    run.kept["benchmark"] = rate
    yield Figure("output tokens", sum(lengths))
    yield Figure("time", taken, "s")
    yield Figure("output", rate, "tokens/s")


def transformers_beside(run: Setting) -> Figures:
    """The same requests by transformers' continuous batching, but for no longer than a while: its rate over that time
    (which leaves out the end, where few sequences run: that is in its favour)."""
    from transformers import AutoConfig, AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig

    drop_engine(run)
    # cuDNN's attention makes a plan for each shape, which counts against transformers more than its kernels do for it.
    torch.backends.cuda.enable_cudnn_sdp(False)
    config = AutoConfig.from_pretrained(model_folder(run, "qwen3-0.6b"))
    with torch.device(run.device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if run.cuda else torch.float32).eval()
    prompts, lengths = benchmark_requests(run)
    drawing = GenerationConfig(do_sample=True, temperature=0.6, top_k=0, eos_token_id=-1, max_new_tokens=max(lengths))
    batching = ContinuousBatchingConfig() if run.cuda else ContinuousBatchingConfig(num_blocks=16, max_batch_tokens=256)
    with model.continuous_batching_context_manager(drawing, timeout=10, continuous_batching_config=batching) as manager:
        _cb_requests(manager, [p[:32] for p in prompts], [4] * len(prompts), WARM_SECONDS)
        tokens, taken = _cb_requests(manager, prompts, lengths, BASELINE_SECONDS)
        cudnn = "on" if torch.backends.cuda.cudnn_sdp_enabled() else "off"
        yield Figure("attention", f"{model.config._attn_implementation}, cuDNN's is {cudnn}")
        yield Figure("tokens", tokens, f"of {sum(lengths)}")
        yield Figure("time", taken, "s")
        yield Figure("transformers' output", tokens / taken, "tokens/s")
    del manager, model
    if "benchmark" not in run.kept:
        for _ in benchmark(run):
            pass
    yield Figure("ours", run.kept["benchmark"] / (tokens / taken), "times transformers'", ">=", TIMES_TRANSFORMERS)


def _cb_requests(manager: Any, prompts: list[list[int]], lengths: list[int], longest: float) -> tuple[int, float]:
    """Output tokens of all requests after `longest` seconds at most, and the seconds."""
    begun = time.perf_counter()
    asked = {
        manager.add_request(prompt, max_new_tokens=length, eos_token_id=-1)
        for prompt, length in zip(prompts, lengths, strict=True)
    }
    tokens = finished = 0
    while finished < len(prompts) and time.perf_counter() - begun < longest:
        if (result := manager.get_result(timeout=0.1)) is not None and result.is_finished():
            if result.request_id not in asked:  # of the warm-up, cut off
                continue
            if result.error:
                raise RuntimeError(result.error)
            tokens += len(result.generated_tokens)
            finished += 1
        elif not manager.is_running():
            raise RuntimeError("transformers' generation thread has ended")
    # `get_result` returns finished requests alone; its scheduler knows of the others.
    taken = time.perf_counter() - begun
    running = list(manager.batch_processor.scheduler.active_requests.values())
    tokens += sum(len(state.generated_tokens) for state in running if state.request_id in asked)
    for request in asked if finished < len(prompts) else ():
        manager.cancel_request(request)
    return tokens, taken
