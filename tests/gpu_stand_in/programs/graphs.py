"""Graphs of presets that FlashInfer has compiled modules for here, as they serve: decodes of several batch sizes."""

from __future__ import annotations

import json
import sys
from collections import Counter

from miniserve.sampling_params import SamplingParams
from tests.gpu_stand_in.programs.common import begin, end, engine, fresh, tokens_come
from tests.support.fake_cuda.device import logged

LAYERS = 2
CHANGED = {"qwen3-next-80b-a3b": (4, {"head_dim": 128, "num_experts": 16})}
"""A preset with recurrent layers, with heads that there are kernels for: so many layers, and what else is different."""
BATCHES = (1, 3, 20, 65)


def main() -> None:
    found = {}
    for preset in sys.argv[1:]:
        layers, shape = CHANGED.get(preset, (LAYERS, {}))
        params = SamplingParams(temperature=0.0, max_tokens=500, ignore_eos=True)
        with logged() as log:
            built = engine(preset, layers, shape, max_model_len=2048, max_num_seqs=128)
            for batch in BATCHES:
                turns = [f"{batch} {i}" for i in range(batch)]
                begin(built.engine, turns, fresh(batch, 40, seed=batch), params)
                for _ in range(4):
                    tokens_come(built.engine)
                end(built.engine, turns)
        graphs = built.runner.graphs
        assert graphs is not None
        nodes = Counter(line.what.split("<")[0].split(" ")[0] for line in log.of("C"))
        found[preset] = {"sizes": sorted(graphs.decodes), "nodes": nodes}
        del built, graphs
    print(json.dumps(found))


if __name__ == "__main__":
    main()
