"""The name of a full KV block: a hash chained over its salt and all tokens up to its end.

Workers name the blocks of their prefix tree with it, routers the blocks of a prompt; equal names mean equal KV.
"""

from __future__ import annotations

import array
from collections.abc import Sequence
from hashlib import blake2b
from typing import Final

HASH_BYTES: Final = 8
_OWN_PREFIXES: Final = ("adapter:", "salt:")


def cache_key(salt: str | None, adapter: bytes | None = None) -> str | None:
    """The salt under which the KV of a request is kept: KV is shared among requests with the same salt and the same
    adapter (its digest). No two pairs have the same key, whatever salts clients choose."""
    if adapter is not None:
        return f"adapter:{adapter.hex()}" if salt is None else f"adapter:{adapter.hex()}:{salt}"
    return f"salt:{salt}" if salt is not None and salt.startswith(_OWN_PREFIXES) else salt


def root_hash(salt: str | None) -> bytes:
    """What the first block of every prompt with this `cache_salt` is chained to."""
    return blake2b(b"" if salt is None else b"salt:" + salt.encode(), digest_size=HASH_BYTES).digest()


def next_hash(parent: bytes, tokens: Sequence[int]) -> bytes:
    """The full block with these tokens, after the one named `parent`."""
    return blake2b(parent + array.array("q", tokens).tobytes(), digest_size=HASH_BYTES).digest()


def block_hashes(tokens: Sequence[int], tokens_per_block: int, salt: str | None) -> list[bytes]:
    """The names of a prompt's full blocks, in order."""
    hashes: list[bytes] = []
    parent = root_hash(salt)
    for at in range(0, len(tokens) - tokens_per_block + 1, tokens_per_block):
        parent = next_hash(parent, tokens[at : at + tokens_per_block])
        hashes.append(parent)
    return hashes
