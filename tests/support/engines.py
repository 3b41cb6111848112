"""Small engines, random prompts for them, and what they answer greedily."""

from __future__ import annotations

import random

from miniserve.llm import LLM
from miniserve.sampling_params import SamplingParams
from tests.support.whole import check_pool

KERNELS = ("torch", "auto")
"""Values of --cpu-kernels with which weights of 4 and 8 bits are tested."""


def prompts(count: int, longest: int = 150, seed: int = 0) -> list[list[int]]:
    """Random prompts of mixed lengths, the first of one token."""
    pick = random.Random(seed)
    lengths = [1, 16, 17, *(pick.randrange(2, longest) for _ in range(count))][:count]
    return [[pick.randrange(256) for _ in range(length)] for length in lengths]


def greedy(llm: LLM, items: list[list[int]], max_tokens: int = 64) -> list[list[int]]:
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    return [g.outputs[0].token_ids for g in llm.generate(items, params, progress=False)]


def small(folder, **engine) -> LLM:
    """A sequence that drafts is never launched ahead: overlap is tested without, unless both are asked for."""
    defaults = {"kv_cache_memory": 2**22, "threads": 1, "prompt_lookup": not engine.get("async_scheduling")}
    return LLM(str(folder), **{**defaults, **engine})


def clean(llm: LLM) -> bool:
    """No page is held and none is lost."""
    check_pool(llm.engine.pool)
    return llm.engine.pool.num_held == 0
