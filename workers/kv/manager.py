"""`KVCacheManager`: who holds which block of the paged KV cache, and which computed blocks are kept for reuse.

Pure bookkeeping: the tensors are the engine's. Called by the executor through `ResourceManager`, asked by schedulers
through `budget()`. It refuses nothing on its own; a plan that takes more than `budget()` allowed is the scheduler's
mistake and raises ValueError.
"""

from __future__ import annotations

import collections
import sys
from collections.abc import Sequence
from typing import Any

from tensorweave.cluster.protocol import DEFAULT_RETENTION_PRIORITY
from tensorweave.workers.kv.block_budget import TreeBudget
from tensorweave.workers.kv.events import CacheEvents
from tensorweave.workers.kv.free_list import BlockPool, BlockTable
from tensorweave.workers.kv.prefix_tree import Node, PrefixMatch, PrefixTree
from tensorweave.workers.step.plan import ScheduledBatch, StepRow
from tensorweave.workers.step.request import LlmRequest
from tensorweave.workers.step.resources import BaseResourceManager, BlockCopy

__all__ = ["BlockCopy", "KVCacheManager"]


class KVCacheManager(BaseResourceManager):
    """Paged blocks with a prefix tree.

    A block is free, or held by one request that still fills it, or full and in the tree: used by any number of
    requests, or idle and kept until its room is needed.

        free ──prepare──▶ own ──full, update──▶ in tree, used ◀──prefix found──▶ in tree, idle ──room needed──▶ free
                           └──full, update: an equal block is in the tree already──▶ free

    With `enable_block_reuse` off nothing goes into the tree. Deterministic: equal calls on every rank give equal
    tables.
    """

    def __init__(
        self,
        num_blocks: int,
        tokens_per_block: int,
        enable_block_reuse: bool = True,
        enable_partial_reuse: bool = True,
        event_buffer_max_size: int = 0,
    ) -> None:
        if num_blocks < 1 or tokens_per_block < 1:
            raise ValueError(f"a KV cache of {num_blocks} blocks of {tokens_per_block} tokens holds nothing")
        self.num_blocks = num_blocks
        self.tokens_per_block = tokens_per_block
        self.enable_block_reuse = enable_block_reuse
        self.now_s = 0.0
        self._pool = BlockPool(num_blocks)
        self._tree = PrefixTree(tokens_per_block, allow_partial=enable_partial_reuse)
        self._events = CacheEvents(event_buffer_max_size if enable_block_reuse else 0, num_blocks)
        self._tables: dict[int, BlockTable] = {}
        self._copies: list[BlockCopy] = []
        self._copy_sources: dict[int, Node] = {}
        self._retired: list[int] = []
        self._num_taken = 0
        self._num_missed = 0
        self._num_reused = 0

    # ---- asked by schedulers, the engine and whoever shows figures

    @property
    def free_blocks(self) -> int:
        """Blocks that hold nothing."""
        return self._pool.num_free

    @property
    def available(self) -> int:
        """Blocks that can be taken now: free, or cached and used by nobody."""
        return self._pool.num_free + self._tree.num_idle

    @property
    def used(self) -> int:
        """Blocks that requests hold."""
        return self.num_blocks - self.available

    @property
    def max_request_tokens(self) -> int:
        """Most tokens, prompt and output, of a request that fits when it is alone; the last one needs no KV."""
        return self.num_blocks * self.tokens_per_block + 1

    def get_max_resource_count(self) -> int:
        return self.num_blocks

    def get_needed_resource_to_completion(self, request: LlmRequest) -> int:
        return -(-(request.max_len - 1) // self.tokens_per_block)

    def budget(self) -> TreeBudget:
        num_sharings = self._tree.num_sharings
        return TreeBudget(self.available, self.tokens_per_block, self._tables, self._match, num_sharings)

    def block_ids(self, request: LlmRequest) -> list[int]:
        """The request's block table, as `KVCache.block_ids` says."""
        return self._tables[request.order].blocks

    def take_copies(self) -> list[BlockCopy]:
        """Copies to make before this step's forward; their sources stay untouched until the step has settled."""
        copies, self._copies = self._copies, []
        return copies

    def take_events(self) -> list[dict[str, Any]]:
        return self._events.take()

    def stats(self) -> dict[str, float]:
        looked_up = self._num_reused + self._num_missed
        return {
            "maxNumBlocks": self.num_blocks,
            "freeNumBlocks": self.available,
            "usedNumBlocks": self.used,
            "cachedNumBlocks": self._tree.num_idle,
            "tokensPerBlock": self.tokens_per_block,
            "allocTotalBlocks": self._num_taken + self._num_reused,
            "allocNewBlocks": self._num_taken,
            "reusedBlocks": self._num_reused,
            "missedBlocks": self._num_missed,
            "cacheHitRate": self._num_reused / looked_up if looked_up else 0.0,
        }

    def retention(self, request: LlmRequest, token_index: int) -> tuple[int, float | None]:
        """Priority of the block that begins at this token, and how long it keeps it unused. Made to be overridden."""
        wanted = request.retention
        if wanted is None:
            return DEFAULT_RETENTION_PRIORITY, None
        if token_index >= request.prompt_len:
            return wanted.decode_priority, wanted.decode_duration_s
        covering = [r for r in wanted.ranges if r.start <= token_index and (r.end is None or token_index < r.end)]
        if not covering:
            return DEFAULT_RETENTION_PRIORITY, None
        best = max(covering, key=lambda r: r.priority)
        return best.priority, best.duration_s

    # ---- the hooks of a step

    def prepare_resources(self, batch: ScheduledBatch) -> None:
        """Give each request of the batch blocks up to its last token of this step.

        All cached prefixes of the batch are held before the first block is taken, so none is evicted for another's
        sake.
        """
        contexts = batch.context + batch.fetching
        partials = [self._start(row) for row in contexts if row.request.order not in self._tables]
        for row in contexts:
            self._num_missed += self._extend(self._tables[row.request.order], row.stop)
        size = self.tokens_per_block
        for row in [row for row in batch.generation if (row[1] - 1) % size + row[2] >= size]:
            self._extend(self._tables[row.request.order], row.stop)  # its last block has no room
        for table, source, num_tokens in partials:
            if source is not None:
                self._copies.append(BlockCopy(source.block, table.blocks[table.num_nodes], num_tokens))

    def update_resources(self, batch: ScheduledBatch) -> None:
        """Put the blocks that this step filled (see `num_computed`) into the tree, where others find them."""
        for block in self._retired:
            self._pool.give(block)
        self._retired.clear()
        for row in batch.context:
            self._release_source(row.request)
            self.store_computed(row.request)
        size = self.tokens_per_block
        for request in [r for r, start, length, _ in batch.generation if (start + length) % size < length]:
            self.store_computed(request)  # it has reached the end of a block

    def store_computed(self, request: LlmRequest) -> None:
        """Each newly full block becomes a node, or is exchanged for the equal one that is there already. The number of
        blocks to be had never falls by that."""
        table = self._tables.get(request.order)
        if table is None or table.next_full > request.num_computed:
            return
        size, blocks = self.tokens_per_block, table.blocks
        while table.next_full <= request.num_computed:
            at = table.num_nodes
            tokens = tuple(request.tokens[at * size : (at + 1) * size])
            node = self._tree.find(table.node, request.cache_salt, tokens)
            is_new = node is None
            if node is None:
                node = self._tree.insert(table.node, request.cache_salt, tokens, table.blocks[at])
            elif not node.refs:  # nobody uses it, and a launched step may read the request's own block
                self._pool.give(node.block)
                node.block = table.blocks[at]
                self._tree.hold(node)
            else:
                self._tree.hold(node)
                if table.blocks is blocks:
                    table.blocks = list(blocks)  # another object: see `KVCache.block_ids`
                self._exchange(request, table, at, node)
            if is_new or request.retention is not None:
                self._tree.retain(node, *self.retention(request, at * size))
            if is_new:
                self._events.stored(node)
            self._add_node(table, node)

    def truncate(self, request: LlmRequest, num_tokens: int) -> None:
        """Raises ValueError below what is in the tree: that has been verified, and others may use it."""
        table = self._tables[request.order]
        num_blocks = -(-num_tokens // self.tokens_per_block)
        if num_blocks < table.num_nodes:
            raise ValueError(f"request {request.request_id} cannot be cut to {num_tokens} tokens: more are in the tree")
        surplus = table.blocks[num_blocks:]
        if not surplus:
            return
        table.blocks = table.blocks[:num_blocks]
        table.num_slots = num_blocks * self.tokens_per_block
        for block in reversed(surplus):
            self._pool.give(block)

    def free_resources(self, request: LlmRequest) -> None:
        """Blocks in the tree stay there while there is room; a paused request finds them again."""
        table = self._tables.pop(request.order, None)
        if table is None:
            return
        self._release_source(request)
        for block in reversed(table.blocks[table.num_nodes :]):
            self._pool.give(block)
        node = table.node
        while node is not None and node.parent is not None:
            self._tree.release(node, self.now_s)
            node = node.parent

    def discard_resources(self, request: LlmRequest) -> Sequence[int]:
        """No request finds what this one has found or computed, from the first block on that it alone uses."""
        table = self._tables.get(request.order)
        if table is None:
            return ()
        lost = table.blocks[table.num_nodes :]
        first, node = None, table.node
        while node is not None and node.parent is not None and node.refs == 1:
            first, node = node, node.parent
        if first is not None:
            for each in self._tree.below(first):
                lost.append(each.block)
                self._events.removed(each)
            self._tree.forget(first)
        self.free_resources(request)
        return lost

    def audit(self) -> list[str]:
        holders: collections.Counter[Node] = collections.Counter(self._copy_sources.values())
        places: collections.Counter[int] = collections.Counter(self._pool.free_ids)
        places.update(self._retired)
        places.update(node.block for node in self._tree.nodes())
        wrong: list[str] = []
        for order, table in self._tables.items():
            path: list[Node] = []
            node = table.node
            while node is not None and node.parent is not None:
                path.insert(0, node)
                node = node.parent
            holders.update(path)
            places.update(table.blocks[table.num_nodes :])
            if [n.block for n in path] != table.blocks[: table.num_nodes]:
                wrong.append(f"request {order}: its table and its path in the tree differ")
            if table.num_slots != len(table.blocks) * self.tokens_per_block:
                wrong.append(f"request {order}: counts {table.num_slots} slots in {len(table.blocks)} blocks")
        misplaced = [block for block in range(self.num_blocks) if places[block] != 1]
        wrong += [f"block {block} is in {places[block]} places, must be in one" for block in misplaced]
        return wrong + self._tree.audit(holders)

    # ---- how

    def _match(self, request: LlmRequest, limit: int) -> PrefixMatch:
        """The cached prefix of a request. If it wants the logits at prompt tokens, those must all be computed."""
        if request.num_rows_read < request.num_prompt_rows:
            limit = min(limit, request.num_rows_read)
        return self._tree.match(request.tokens, limit, request.cache_salt)

    def _start(self, row: StepRow) -> tuple[BlockTable, Node | None, int]:
        """Hold the cached prefix that the plan counts on; returns what else of it is to be copied."""
        request = row.request
        match = self._match(request, request.context_len - 1)  # a quote's: a shorter one may copy from another block
        if len(match.nodes) * self.tokens_per_block + match.num_partial != row.start:
            match = self._match(request, row.start)
        if len(match.nodes) * self.tokens_per_block + match.num_partial != row.start:
            raise ValueError(
                f"the schedule starts request {request.request_id} at token {row.start}, beyond what is cached"
            )
        table = BlockTable(next_full=self.tokens_per_block if self.enable_block_reuse else sys.maxsize)
        for node in match.nodes:
            self._tree.hold(node)
            self._add_node(table, node)
            table.blocks.append(node.block)
            if request.retention is not None:
                self._tree.retain(node, *self.retention(request, (table.num_nodes - 1) * self.tokens_per_block))
        table.num_slots = len(table.blocks) * self.tokens_per_block
        if match.partial is not None:
            self._tree.hold(match.partial)
            self._copy_sources[request.order] = match.partial
        self._num_reused += len(match.nodes)
        self._tables[request.order] = table
        if not request.num_preemptions:
            request.num_cached_tokens = row.start
        return table, match.partial, match.num_partial

    def _extend(self, table: BlockTable, num_tokens: int) -> int:
        """Blocks up to `num_tokens` tokens; returns how many were taken."""
        num_held = len(table.blocks)
        while table.num_slots < num_tokens:
            table.blocks.append(self._take_block())
            table.num_slots += self.tokens_per_block
        return len(table.blocks) - num_held

    def _take_block(self) -> int:
        self._num_taken += 1
        if self._pool.num_free:
            return self._pool.take()
        if not self._tree.num_idle:
            raise ValueError(f"the schedule takes more KV blocks than there are ({self.num_blocks})")
        node = self._tree.evict(self.now_s)
        self._events.removed(node)
        return node.block

    def _exchange(self, request: LlmRequest, table: BlockTable, at: int, node: Node) -> None:
        """A launched step may still read the request's own block: then it is free once that step has settled."""
        if request.num_launched > request.num_computed:
            self._retired.append(table.blocks[at])
        else:
            self._pool.give(table.blocks[at])
        table.blocks[at] = node.block

    def _release_source(self, request: LlmRequest) -> None:
        source = self._copy_sources.pop(request.order, None)
        if source is not None:
            self._tree.release(source, self.now_s)

    def _add_node(self, table: BlockTable, node: Node) -> None:
        table.node = node
        table.num_nodes += 1
        table.next_full += self.tokens_per_block
