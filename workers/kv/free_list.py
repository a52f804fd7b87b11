"""The free list of KV blocks, and the table of blocks that one request holds. Used by the KV cache manager only.

BlockTable.blocks   [ 7 ][ 2 ][ 9 ][ 4 ][ 1 ]
                    └ in the prefix tree ┘└ the request's own: not full yet ┘
                      shared, counted by     held by nobody else
                      the nodes' `refs`
"""

from __future__ import annotations

from dataclasses import dataclass, field

from tensorweave.workers.kv.prefix_tree import Node


class BlockPool:
    """Block ids 0 to `num_blocks` - 1 that nobody holds; the last one given back is the first one taken."""

    def __init__(self, num_blocks: int) -> None:
        self._free = list(range(num_blocks - 1, -1, -1))
        self._is_free = bytearray(b"\x01" * num_blocks)

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def free_ids(self) -> tuple[int, ...]:
        return tuple(self._free)

    def take(self) -> int:
        block = self._free.pop()
        self._is_free[block] = 0
        return block

    def give(self, block: int) -> None:
        assert not self._is_free[block], f"block {block} given back twice"
        self._is_free[block] = 1
        self._free.append(block)


@dataclass(slots=True, eq=False)
class BlockTable:
    """A started request's blocks. The first `num_nodes` are those of the tree nodes from the root's child down to
    `node`.

    `num_slots` is how many tokens `blocks` hold; once `num_computed` reaches `next_full`, another block belongs into
    the tree. The first `num_shared` nodes had other users too when the tree's `num_sharings` was `shared_at`.
    """

    next_full: int
    blocks: list[int] = field(default_factory=list)
    num_slots: int = 0
    node: Node | None = None
    num_nodes: int = 0
    num_shared: int = 0
    shared_at: int = 0

    def num_own(self, num_sharings: int) -> int:
        """Blocks that no other request uses."""
        if self.shared_at != num_sharings:
            node, num_unshared = self.node, 0
            while node is not None and node.refs == 1 and node.parent is not None:
                node, num_unshared = node.parent, num_unshared + 1
            self.num_shared, self.shared_at = self.num_nodes - num_unshared, num_sharings
        return len(self.blocks) - self.num_shared
