"""What a layer does with each token by itself: an MLP, or a mixture of experts of which a few work on a token."""

from torch import Tensor

from miniserve.model.config import LayerConfig
from miniserve.model.loader import Loader
from miniserve.model.passes import Pass
from miniserve.ops import StackingOps
from miniserve.ops.decoder import Experts, Mlp


def load(loader: Loader, at: str, layer: LayerConfig) -> Mlp | Experts:
    """The MLP or the experts of the layer whose tensors are named `at`."""
    config = loader.config
    sizes = config.experts if layer.experts else None
    if sizes is None:
        names = [f"{at}mlp.{name}_proj" for name in ("gate", "up", "down")]
        return _mlp(loader, names, config.intermediate_size, bias=config.mlp_bias)
    router, where, *parts = config.family.experts
    # transformers and newer files have all experts in one tensor, older files each by itself.
    together = f"{at}mlp.experts.gate_up_proj", f"{at}mlp.experts.down_proj"
    if loader.has(together[0]):
        gate_up = loader.dense(loader.read(together[0], sizes.count, 2 * sizes.inner, config.hidden_size))
        down = loader.dense(loader.read(together[1], sizes.count, config.hidden_size, sizes.inner))
        experts = [
            Mlp(loader.prepared([up], None, gated=config.activation), loader.prepared([back], None))
            for up, back in zip(gate_up, down, strict=True)
        ]
    else:
        named = ([f"{at}{where}.{i}.{part}" for part in parts] for i in range(sizes.count))
        experts = [_mlp(loader, names, sizes.inner) for names in named]
    stacked = loader.ops.stack(experts) if isinstance(loader.ops, StackingOps) else None
    inner, shared = sizes.shared_inner, [f"{at}mlp.shared_expert.{name}_proj" for name in ("gate", "up", "down")]
    return Experts(
        chosen=sizes.chosen,
        renormed=sizes.renormed,
        router=loader.plain({at + router: sizes.count}, config.hidden_size),
        experts=experts if stacked is None else [],
        stacked=stacked,
        shared=_mlp(loader, shared, inner) if inner else None,
        shared_gate=loader.plain({f"{at}mlp.shared_expert_gate": 1}, config.hidden_size) if inner else None,
    )


def _mlp(loader: Loader, names: list[str], inner: int, bias: bool = False) -> Mlp:
    (gate, up, down), config = names, loader.config
    return Mlp(
        loader.linear({gate: inner, up: inner}, config.hidden_size, bias, gated=config.activation),
        loader.linear({down: config.hidden_size}, inner, bias),
    )


def think(part: Mlp | Experts, h: Tensor, residual: Tensor | None, now: Pass) -> Tensor:
    """`h` `[T, hidden]` -> `[T, hidden]`, with the `residual` added, perhaps in its place."""
    if isinstance(part, Mlp):
        return part.down(part.gate_up(h), residual)
    odds = part.router(h).softmax(-1)  # [T, experts]
    weights, ids = odds.topk(part.chosen, -1)  # 2 x [T, chosen]
    if part.renormed:
        weights /= weights.sum(-1, keepdim=True)
    out = now.ops.mixture(part, h, ids, weights)
    if part.shared is not None and part.shared_gate is not None:
        out += part.shared.down(part.shared.gate_up(h)) * part.shared_gate(h).sigmoid().to(h.dtype)
    return out if residual is None else out.add_(residual)
