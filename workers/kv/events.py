"""Events of cached KV blocks, for routers that send requests to where their prefix is cached. Filled by the KV cache
manager.

Bounded: if nobody takes them, the oldest events are dropped, which a gap in `event_id` shows. With `max_events` 0
nothing is kept.
"""

from __future__ import annotations

import collections
from typing import Any

from tensorweave.workers.kv.prefix_tree import Node


class CacheEvents:
    def __init__(self, max_events: int, num_blocks: int) -> None:
        self._events: collections.deque[dict[str, Any]] = collections.deque(maxlen=max_events)
        self._is_on = max_events > 0
        self._next_id = 0
        self._add({"type": "created", "num_blocks_per_cache_level": [num_blocks]})

    def stored(self, node: Node) -> None:
        """A block holds new tokens; `parent_hash` is the block before it, or its salt's root."""
        if self._is_on and node.parent is not None:
            tokens = [{"token_id": token} for token in node.tokens]
            block = {
                "type": "stored_block",
                "block_hash": node.digest.hex(),
                "tokens": tokens,
                "cache_level": 0,
                "priority": node.priority,
            }
            self._add({"type": "stored", "parent_hash": node.parent.digest.hex(), "blocks": [block]})

    def removed(self, node: Node) -> None:
        if self._is_on:
            self._add({"type": "removed", "block_hashes": [node.digest.hex()]})

    def take(self) -> list[dict[str, Any]]:
        """Take the events since the last call, oldest first. Any thread may call it."""
        taken = []
        while self._events:
            taken.append(self._events.popleft())
        return taken

    def _add(self, data: dict[str, Any]) -> None:
        self._events.append({"event_id": self._next_id, "data": data})
        self._next_id += 1
