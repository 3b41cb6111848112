"""The chain hash that names a page by all tokens up to its end. It imports no torch: the scheduler uses it too."""

import struct
from array import array
from collections.abc import Sequence
from hashlib import blake2b

HASH_BYTES = 16


def root_hash(layout: str, salt: str = "") -> bytes:
    """The hash before the first token: different models, dtypes and cache salts never share a page."""
    return blake2b(f"{len(layout)}:{layout}{salt}".encode(), digest_size=HASH_BYTES).digest()


def token_bytes(tokens: Sequence[int]) -> bytes:
    """Four bytes a token. Of a list `struct` makes them in half the time that `array` takes."""
    return tokens.tobytes() if isinstance(tokens, array) else struct.pack(f"{len(tokens)}i", *tokens)


def snapshot_names(digest: bytes, pages: int) -> list[bytes]:
    """Names of the `pages` that hold the recurrent state after all tokens that `digest` stands for."""
    return [digest + part.to_bytes(2) for part in range(pages)]


def is_snapshot(name: bytes) -> bool:
    """Whether a page of that name holds recurrent state."""
    return len(name) > HASH_BYTES


def page_hashes(root: bytes, tokens: Sequence[int], page_tokens: int, known: list[bytes] | None = None) -> list[bytes]:
    """Chain hashes of the full pages of `tokens`; `known` are those of the first pages, not computed again."""
    hashes = list(known or ())
    parent = hashes[-1] if hashes else root
    size = page_tokens * 4
    data = token_bytes(tokens[len(hashes) * page_tokens :])
    for end in range(size, len(data) + 1, size):
        parent = blake2b(parent + data[end - size : end], digest_size=HASH_BYTES).digest()
        hashes.append(parent)
    return hashes
