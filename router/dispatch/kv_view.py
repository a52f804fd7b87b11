"""`PromptView`: how much of one prompt each gang already holds, from the links' KV mirrors.

The dispatcher makes one per attempt and the policies read it. Block hashes are computed about as far as some gang holds
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
        return min(link.kv.cached_tokens(self._hashes_of(link.info.tokens_per_block)), len(self._tokens) - 1)

    def uncached_tokens(self, link: GangLink) -> int:
        return len(self._tokens) - self.cached_tokens(link)

    def holders(self, links: Sequence[GangLink], most: int) -> Sequence[GangLink]:
        """Up to `most` of these gangs that hold most of the prompt.

        A gang that holds a block holds those before it, so that few depths need to be looked at: they double while
        more than `most` gangs hold the prompt up to there, then halve.
        """
        held, depth, step, doubles = links, 0, 1, True
        while step and (len(held) > most or not depth):
            deeper = self._that_hold(held, depth + step)
            doubles = doubles and bool(deeper)
            if deeper:
                held, depth = deeper, depth + step
            step = step * 2 if doubles else step // 2
        return held[:most] if depth else ()

    def _that_hold(self, links: Sequence[GangLink], num_blocks: int) -> Sequence[GangLink]:
        names = {
            size: self._hashes_of(size).last_of(num_blocks) for size in {link.info.tokens_per_block for link in links}
        }
        return [link for link in links if names[link.info.tokens_per_block] in link.kv]

    def _hashes_of(self, tokens_per_block: int) -> _BlockHashes:
        hashes = self._hashes.get(tokens_per_block)
        if hashes is None:
            hashes = self._hashes[tokens_per_block] = _BlockHashes(self._tokens, tokens_per_block, self._salt)
        return hashes


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
                self._learn()
            yield self._known[index]

    def last_of(self, num_blocks: int) -> bytes | None:
        """The name of the last of the prompt's first blocks; None if it has fewer."""
        if num_blocks > len(self._tokens) // self._size:
            return None
        while len(self._known) < num_blocks:
            self._learn()
        return self._known[num_blocks - 1]

    def _learn(self) -> None:
        parent, at = self._known[-1] if self._known else self._root, len(self._known) * self._size
        self._known.append(next_hash(parent, self._tokens[at : at + self._size]))
