"""What one rank of several has of a model: Megatron-LM (arXiv 1909.08053).

Heads, and the inner numbers of MLPs and of each expert, are divided among the ranks. The matrices that make them are
cut by rows, those that use them by columns: what the latter make is added up over the ranks, and is the layer's. Norms,
the router and the embedding are the same on all.
"""

from dataclasses import dataclass, replace
from functools import cached_property

import torch

from miniserve.config import ConfigError, problem
from miniserve.model.checkpoints import Read
from miniserve.model.config import ModelConfig
from miniserve.ops.quantized import GROUP, Quantized, Weight, dense

DELTA = "in_proj_qkvz", "in_proj_ba", "in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "conv1d", "A_log", "dt_bias"
ROWS = {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "w1", "w3", "gate_up_proj", *DELTA}
"""Modules whose rows are cut, as Hugging Face's files call them."""
COLUMNS = {"o_proj", "out_proj", "down_proj", "w2"}
"""Modules whose columns are cut; the first rank alone adds the bias."""


@dataclass(frozen=True)
class Shard:
    """Rank `rank` of `ranks` of the model `whole`."""

    whole: ModelConfig
    rank: int = 0
    ranks: int = 1

    @cached_property
    def config(self) -> ModelConfig:
        """The sizes of what is computed here. Fewer heads of K and V than ranks are each on several. Raises
        `ConfigError` for sizes that cannot be divided."""
        whole, ranks, delta, experts = self.whole, self.ranks, self.whole.delta, self.whole.experts
        if wrong := _undivided(whole, ranks):
            ways = [str(n) for n in range(1, whole.heads + 1) if not _undivided(whole, n)]
            raise ConfigError(problem("model.ranks", ranks=ranks, wrong=", ".join(wrong), ways=", ".join(ways)))
        if delta is not None:
            delta = replace(delta, k_heads=delta.k_heads // ranks, v_heads=delta.v_heads // ranks)
        if experts is not None:
            experts = replace(experts, inner=experts.inner // ranks, shared_inner=experts.shared_inner // ranks)
        return replace(
            whole,
            heads=whole.heads // ranks,
            kv_heads=max(whole.kv_heads // ranks, 1),
            intermediate_size=max(whole.intermediate_size // ranks, 1),
            delta=delta,
            experts=experts,
        )

    def read(self, read: Read, name: str, shape: tuple[int, ...]) -> Weight:
        """What this rank has, in this `shape`, of the whole tensor that `read` gets. Raises `ConfigError`."""
        module = name.removesuffix(".weight").removesuffix(".bias").rpartition(".")[2]
        if self.ranks == 1 or module not in ROWS | COLUMNS:
            return read(name, shape)
        if module in COLUMNS and name.endswith(".bias"):
            bias = dense(read(name, shape), torch.float32)
            return torch.zeros_like(bias) if self.rank else bias
        axis = len(shape) - 1 if module in COLUMNS else int(module == "gate_up_proj")
        pieces = min(self.ranks, self.whole.kv_heads) if module in ("k_proj", "v_proj") else self.ranks
        size, place = shape[axis] * pieces, self.rank * pieces // self.ranks
        whole = read(name, (*shape[:axis], size, *shape[axis + 1 :]))
        runs = torch.arange(size).split(self._runs(module, size))
        kept = torch.cat([run.view(pieces, -1)[place] for run in runs])
        if isinstance(whole, Quantized) and axis:
            if shape[1] % GROUP:
                raise ConfigError(problem("model.groups", name=name, size=size, group=GROUP, part=shape[1]))
            return whole.columns(int(kept[0]), shape[1])
        if isinstance(whole, Quantized):
            return whole[kept]
        if len(runs) == 1:  # neighbours are not copied: of a mapped file only that is read
            return whole.narrow(axis, int(kept[0]), len(kept))
        return whole.index_select(axis, kept.to(whole.device))

    def head(self, weight: Weight) -> Weight:
        """The rows of `[vocab, hidden]` whose logits this rank makes, the last one again where that fills it up."""
        if self.ranks == 1:
            return weight
        count = -(-weight.shape[0] // self.ranks)
        rows = torch.arange(self.rank * count, (self.rank + 1) * count).clamp_(max=weight.shape[0] - 1)
        return weight[rows]

    def _runs(self, module: str, size: int) -> list[int]:
        """What follows on another along the axis that is cut, each divided by itself."""
        if module in ("in_proj_qkv", "conv1d") and (delta := self.whole.delta):
            keys = delta.k_heads * delta.k_dim
            return [keys, keys, size - 2 * keys]
        return [size // 2] * 2 if module == "gate_up_proj" else [size]


def _undivided(whole: ModelConfig, ranks: int) -> list[str]:
    """The sizes that `ranks` cannot divide, in words."""
    sizes = {"heads": whole.heads}
    if any(not layer.experts for layer in whole.layers):
        sizes["numbers of an MLP"] = whole.intermediate_size
    if whole.experts:
        sizes |= {"numbers of an expert": whole.experts.inner, "of the shared expert": whole.experts.shared_inner}
    if whole.delta:
        sizes |= {"heads of keys": whole.delta.k_heads, "heads of values": whole.delta.v_heads}
    wrong = [f"{size} {what}" for what, size in sizes.items() if size % ranks]
    kv = whole.kv_heads
    return wrong + ([f"{kv} heads of K and V"] if kv % ranks and ranks % kv else [])
