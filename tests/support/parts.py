"""Parts of a model without their weights."""

from typing import Any

from miniserve.ops.decoder import Attention


def attention_part(index: int, scale: float, window: int = 0) -> Attention:
    """What kernels of attention look at."""
    sizes: dict[str, Any] = {"heads": 0, "kv_heads": 0, "dim": 0, "rope": 0, "gated": False}
    none: dict[str, Any] = dict.fromkeys(("qkv", "q_norm", "k_norm", "out"))
    return Attention(index=index, scale=scale, window=window, **sizes, **none)
