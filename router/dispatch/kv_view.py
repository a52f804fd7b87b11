"""`PromptView`: how much of one prompt each gang already holds, from the links' KV mirrors.

The dispatcher makes one per attempt and the policies read it. Block hashes are computed only as far as some gang holds
the blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from tensorweave.cluster.block_hash import cache_key, next_hash, root_hash
from tensorweave.cluster.link import GangLink
from tensorweave.cluster.protocol import GenerateRequest


class PromptView:
    def __init__(self, request: GenerateRequest) -> None:
        self._tokens = request.prompt_token_ids
        self._salt = cache_key(request.cache_salt, None if request.adapter is None else request.adapter.digest)
        self._hashes: dict[int, _BlockHashes] = {}

    @property
    def num_tokens(self) -> int:
        return len(self._tokens)

    def cached_tokens(self, link: GangLink) -> int:
        """Leading prompt tokens whose KV the gang has; never all of them, since the last one is always computed."""
        if not len(link.kv):
            return 0
        size = link.info.tokens_per_block
        hashes = self._hashes.get(size)
        if hashes is None:
            hashes = self._hashes[size] = _BlockHashes(self._tokens, size, self._salt)
        return min(link.kv.cached_tokens(hashes), len(self._tokens) - 1)

    def uncached_tokens(self, link: GangLink) -> int:
        return len(self._tokens) - self.cached_tokens(link)


class _BlockHashes:
    """The chained hashes of a prompt's full blocks, each computed when first read."""

    def __init__(self, tokens: Sequence[int], tokens_per_block: int, salt: str | None) -> None:
        self._tokens = tokens
        self._size = tokens_per_block
        self._root = root_hash(salt)
        self._known: list[bytes] = []

    def __iter__(self) -> Iterator[bytes]:
        for index in range(len(self._tokens) // self._size):
            if index == len(self._known):
                parent = self._known[-1] if self._known else self._root
                at = index * self._size
                self._known.append(next_hash(parent, self._tokens[at : at + self._size]))
            yield self._known[index]
