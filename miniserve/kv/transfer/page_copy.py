"""The kernel that copies whole pages between two pools which one GPU can address. Only a CUDA worker needs triton.

Not run on a GPU yet (docs/gpu.md); tests compare it on the CPU by triton's interpreter, where triton is installed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK_WORDS = 2048
"""Words of 8 bytes that one program copies: 16 KiB, eight 16-byte loads for each of 128 threads."""


@triton.jit
def _copy(source, target, froms, tos, words, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]  # compiled by triton
    """Program (i, j) copies block j of page `froms[i]` of `source` to page `tos[i]` of `target`."""
    # 64-bit numbers: a pool has more words than 32 bits count.
    one = tl.load(froms + tl.program_id(0)) * words
    other = tl.load(tos + tl.program_id(0)) * words
    within = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = within < words
    tl.store(target + other + within, tl.load(source + one + within, mask=inside), mask=inside)


def copy_pages(source: torch.Tensor, froms: list[int], target: torch.Tensor, tos: list[int]) -> None:
    """Launch on the current stream: page `froms[i]` of `source` to page `tos[i]` of `target`, both int64
    `[page, word]` and contiguous."""
    words = target.shape[1]
    # Pinned, so that the host does not wait; torch keeps it until it has been read. An even length, since triton
    # compiles another kernel for numbers that do not begin at a multiple of 16 bytes.
    numbers = torch.zeros((2, len(froms) + len(froms) % 2), dtype=torch.int64, pin_memory=target.is_cuda)
    numbers[:, : len(froms)] = torch.tensor([froms, tos])
    numbers = numbers.to(target.device, non_blocking=True)
    grid = (len(froms), triton.cdiv(words, BLOCK_WORDS))
    _copy[grid](source, target, numbers[0], numbers[1], words, BLOCK=BLOCK_WORDS)
