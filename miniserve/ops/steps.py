"""Parts of a layer, made of smaller operations where some `Ops` have no kernel for the whole."""

from typing import Any, Protocol

from torch import Tensor

from miniserve.ops.decoder import Attention, Linear


class Steps(Protocol):
    """In the shapes T is the number of new tokens in the batch, H and Hkv are heads, D the head's size."""

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Root mean square norm over the last dimension."""

    def rope(self, q: Tensor, k: Tensor, cos_sin: Any) -> tuple[Tensor, Tensor]:
        """Rotate `q` `[T, H, D]` and `k` `[T, Hkv, D]`, perhaps in place: of the first R numbers of a head, as many as
        there are angles for twice, each with the one R / 2 away."""

    def attention(self, plan: Any, part: Attention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Store the new tokens' `k`, `v` `[T, Hkv, D]` in the pool, then attend causally: `q` -> `[T, H, D]`."""

    def product(self, linear: Linear, x: Tensor, norm: Tensor, eps: float) -> Tensor:
        """What `linear` makes of `x` `[T, in]`, normed with the weights `norm`."""
        return linear(self.rms_norm(x, norm, eps))

    def attend(self, plan: Any, part: Attention, x: Tensor, norm: Tensor, eps: float, cos_sin: Any) -> Tensor:
        """The same with the products before it: `x` `[T, hidden]`, normed with the weights `norm`, -> what the heads
        found, `[T, H * D]`. The norms of queries and keys have the same `eps`."""
        every = self.product(part.qkv, x, norm, eps).view(len(x), -1, part.dim)  # [T, H + 2 * Hkv (+ H), D]
        q, k, v = every[:, : part.heads + 2 * part.kv_heads].split((part.heads, part.kv_heads, part.kv_heads), 1)
        if part.q_norm is not None and part.k_norm is not None:
            q, k = self.rms_norm(q, part.q_norm, eps), self.rms_norm(k, part.k_norm, eps)
        q, k = self.rope(q, k, cos_sin)
        return passed(part, self.attention(plan, part, q, k, v), every)


def passed(part: Attention, found: Tensor, every: Tensor) -> Tensor:
    """What the gates, which come last in `every`, let through of what the heads found: `[T, H * D]`."""
    found = found.flatten(1)
    return found * every[:, -part.heads :].flatten(1).sigmoid() if part.gated else found
