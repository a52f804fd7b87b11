"""`TreeBudget`: how many blocks one step's plan may still give out, exact for shared and cached blocks. Made by
`KVCacheManager.budget`.

A block counts as given out when somebody uses it. The plan's own pauses and starts are an overlay on the nodes' `refs`,
so a cached block that two starts share is counted once, and a block of two paused requests comes back with the second.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from tensorweave.workers.kv.free_list import BlockTable
from tensorweave.workers.kv.prefix_tree import Node, PrefixMatch
from tensorweave.workers.step.request import LlmRequest
from tensorweave.workers.step.resources import Quote


class TreeBudget:
    def __init__(
        self,
        num_left: int,
        tokens_per_block: int,
        tables: Mapping[int, BlockTable],
        match: Callable[[LlmRequest, int], PrefixMatch],
        num_sharings: int,
    ) -> None:
        self.num_left = num_left
        self._tokens_per_block = tokens_per_block
        self._tables = tables
        self._match = match
        self._num_sharings = num_sharings
        self._users: dict[object, int] = {}

    def missing(self, request: LlmRequest, num_tokens: int) -> int:
        num_over = num_tokens - self._tables[request.order].num_slots
        return -(-num_over // self._tokens_per_block) if num_over > 0 else 0

    def freed(self, requests: Sequence[LlmRequest]) -> list[int]:
        tables, num_sharings = self._tables, self._num_sharings
        return [tables[request.order].num_own(num_sharings) for request in requests]

    def reserve(self, num_blocks: int) -> None:
        self.num_left -= num_blocks

    def quote(self, request: LlmRequest, num_tokens: int) -> Quote:
        """A partly matching block is counted on only where there is room to keep it until it is copied."""
        match = self._match(request, request.context_len - 1)
        num_new = -(-num_tokens // self._tokens_per_block) - len(match.nodes)
        users = [self._num_users(node) for node in match.nodes]
        num_blocks, num_kept = num_new + users.count(0), users.count(1)
        start = len(match.nodes) * self._tokens_per_block
        if match.partial is not None:
            num_users = self._num_users(match.partial)
            num_with_copy = num_blocks + (num_users == 0)
            if num_with_copy <= self.num_left:
                pins = (*match.nodes, match.partial)
                return Quote(start + match.num_partial, num_with_copy, pins, num_kept + (num_users == 1))
        return Quote(start, num_blocks, match.nodes, num_kept)

    def take(self, quote: Quote) -> None:
        self.num_left -= quote.num_blocks
        for pin in quote.pins:
            self._users[pin] = self._users.get(pin, 0) + 1

    def release(self, request: LlmRequest) -> None:
        table = self._tables[request.order]
        self.num_left += len(table.blocks) - table.num_nodes
        node = table.node
        while node is not None and node.parent is not None:
            self._users[node] = self._users.get(node, 0) - 1
            self.num_left += not self._num_users(node)
            node = node.parent

    def _num_users(self, node: Node) -> int:
        return node.refs + self._users.get(node, 0)
