"""The tiny models themselves: parity with them means nothing if their text is dull or forgets its prompt."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import transformers

from tests.support import tiny


@pytest.mark.parametrize("name", ["llama", "llama3", "qwen2", "qwen3", "mistral"])
def test_greedy_text_wanders_and_sees_the_whole_prompt(tiny_models: dict[str, Path], name: str) -> None:
    prompt = tiny.prompts(1, shortest=60)[0]
    other = [(prompt[0] + 1) % 256, *prompt[1:]]
    one, two = tiny.reference(tiny_models[name], [prompt, other], 64)
    assert len(set(one)) > 20
    assert one != two
    whole = tiny.reference_logits(tiny_models[name], prompt + one).argmax(-1).tolist()
    assert whole[len(prompt) - 1 : -1] == one


def test_models_may_be_loaded_at_once(tmp_path: Path) -> None:
    """Their weights are tied, and so are those of models that are loaded later."""
    folders = [tiny.make_model(tmp_path / str(number), "llama", tie=True, seed=number) for number in range(6)]
    ties = transformers.PreTrainedModel.tie_weights
    with ThreadPoolExecutor(len(folders)) as pool:
        loaded = list(pool.map(tiny.reference_logits, folders, [[1, 2, 3]] * len(folders)))
    assert transformers.PreTrainedModel.tie_weights is ties
    assert all(logits.isfinite().all() and logits.abs().max() < 1e3 for logits in loaded)
