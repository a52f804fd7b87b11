"""The prefix tree: which full KV blocks hold which tokens, who uses them, and which is evicted first.

A node is one full block. Its children are keyed by their tokens, and each `cache_salt` has its own root. A request
holds every node on its path, so the ancestors of a node in use are in use, and all nodes with `refs` 0 can be evicted,
leaves first. Used by the KV cache manager.
"""

from __future__ import annotations

import bisect
import heapq
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from tensorweave.cluster.block_hash import next_hash, root_hash
from tensorweave.cluster.protocol import DEFAULT_RETENTION_PRIORITY

TokenTuple = tuple[int, ...]


@dataclass(slots=True, eq=False)
class Node:
    """One full block. `digest` chains the salt and all tokens up to here; `parent` is None once evicted (and for a
    root).

    `keys` are the children's tokens in order, for the longest common prefix. An idle node's `expires_s` is when its
    priority falls to the default: `duration_s` after its last use.
    """

    tokens: TokenTuple
    block: int
    parent: Node | None
    digest: bytes
    refs: int = 0
    priority: int = DEFAULT_RETENTION_PRIORITY
    duration_s: float | None = None
    expires_s: float = math.inf
    last_used: int = 0
    children: dict[TokenTuple, Node] = field(default_factory=dict)
    keys: list[TokenTuple] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class PrefixMatch:
    """`nodes` from the root's child down; `partial` is a child of the last, `num_partial` tokens of which match too."""

    nodes: tuple[Node, ...] = ()
    partial: Node | None = None
    num_partial: int = 0


class PrefixTree:
    def __init__(self, tokens_per_block: int, *, allow_partial: bool) -> None:
        self.num_nodes = 0
        self.num_idle = 0
        self.num_sharings = 0
        """How often a node has got a second user, or has one left again."""
        self._tokens_per_block = tokens_per_block
        self._allow_partial = allow_partial
        self._roots: dict[str | None, Node] = {}
        self._uses = 0
        self._pushes = 0
        self._num_forgotten = 0
        # Heaps with stale entries, recognised when popped: (priority, last_used, push, node) of idle leaves,
        # (expires_s, push, node).
        self._leaves: list[tuple[int, int, int, Node]] = []
        self._expiries: list[tuple[float, int, Node]] = []

    def match(self, tokens: Sequence[int], limit: int, salt: str | None) -> PrefixMatch:
        """The longest cached prefix of `tokens[:limit]`. Changes nothing."""
        size = self._tokens_per_block
        node = self._roots.get(salt)
        nodes: list[Node] = []
        if node is None:
            return PrefixMatch()
        at = 0
        while at + size <= limit:
            child = node.children.get(tuple(tokens[at : at + size]))
            if child is None:
                break
            nodes.append(child)
            node = child
            at += size
        rest = tuple(tokens[at : min(at + size, limit)])
        if self._allow_partial and rest and node.keys:
            key, length = _longest_common_prefix(node.keys, rest)
            if length:
                return PrefixMatch(tuple(nodes), node.children[key], length)
        return PrefixMatch(tuple(nodes))

    def find(self, parent: Node | None, salt: str | None, tokens: TokenTuple) -> Node | None:
        """The node with these tokens under `parent` (None: the salt's root)."""
        above = parent or self._roots.get(salt)
        return None if above is None else above.children.get(tokens)

    def insert(self, parent: Node | None, salt: str | None, tokens: TokenTuple, block: int) -> Node:
        """A new node, in use by the caller, who also uses `parent`."""
        above = parent or self._root(salt)
        assert tokens not in above.children
        node = Node(tokens, block, above, next_hash(above.digest, tokens), refs=1)
        above.children[tokens] = node
        bisect.insort(above.keys, tokens)
        self.num_nodes += 1
        return node

    def retain(self, node: Node, priority: int, duration_s: float | None) -> None:
        """Set the priority that a node in use has once nobody uses it, and for how long."""
        assert node.refs
        node.priority, node.duration_s = priority, duration_s

    def hold(self, node: Node) -> None:
        if not node.refs:
            self.num_idle -= 1
            node.expires_s = math.inf
        elif node.refs == 1:
            self.num_sharings += 1
        node.refs += 1

    def release(self, node: Node, now_s: float) -> None:
        node.refs -= 1
        if node.refs:
            self.num_sharings += node.refs == 1
            return
        self.num_idle += 1
        self._uses += 1
        node.last_used = self._uses
        if node.duration_s is not None:
            node.expires_s = now_s + node.duration_s
            self._pushes += 1
            heapq.heappush(self._expiries, (node.expires_s, self._pushes, node))
        self._offer(node)

    def evict(self, now_s: float) -> Node:
        """Take out the least recently used idle leaf of the lowest priority; its block is the caller's."""
        self._expire(now_s)
        while True:
            entry = heapq.heappop(self._leaves)
            if _is_current(entry):
                break
        node = entry[-1]
        parent = node.parent
        assert parent is not None
        del parent.children[node.tokens]
        del parent.keys[bisect.bisect_left(parent.keys, node.tokens)]
        node.parent = None
        self.num_nodes -= 1
        self.num_idle -= 1
        if parent.parent is not None:
            self._offer(parent)
        elif not parent.children:
            self._roots = {salt: root for salt, root in self._roots.items() if root is not parent}
        return node

    def forget(self, node: Node) -> None:
        """No match finds this node, or one below it, again. It keeps its place, under tokens that no prompt has, so
        that those that use it go on and eviction takes it in its turn."""
        parent = node.parent
        assert parent is not None
        self._num_forgotten += 1
        del parent.children[node.tokens]
        del parent.keys[bisect.bisect_left(parent.keys, node.tokens)]
        node.tokens = (-self._num_forgotten,) * self._tokens_per_block
        parent.children[node.tokens] = node
        bisect.insort(parent.keys, node.tokens)
        for each in self.below(node):
            assert each.parent is not None
            each.digest = next_hash(each.parent.digest, each.tokens)

    def nodes(self) -> Iterator[Node]:
        """All nodes, parents first."""
        for root in self._roots.values():
            for child in root.children.values():
                yield from self.below(child)

    def below(self, node: Node) -> Iterator[Node]:
        """The node and all under it, parents first."""
        stack = [node]
        while stack:
            node = stack.pop()
            yield node
            stack.extend(node.children.values())

    def audit(self, holders: Mapping[Node, int]) -> list[str]:
        """What is wrong, given how often each node is really held."""
        wrong: list[str] = []
        every = list(self.nodes())
        offered = {id(entry[-1]) for entry in self._leaves if _is_current(entry)}
        for node in every:
            name = f"node of block {node.block}"
            if node.refs != holders.get(node, 0):
                wrong.append(f"{name}: refs {node.refs}, held {holders.get(node, 0)} times")
            if node.refs and node.parent is not None and node.parent.parent is not None and not node.parent.refs:
                wrong.append(f"{name}: in use under an idle parent")
            if len(node.tokens) != self._tokens_per_block:
                wrong.append(f"{name}: has {len(node.tokens)} tokens")
            if not node.refs and not node.children and id(node) not in offered:
                wrong.append(f"{name}: an idle leaf that eviction cannot find")
        for node in [*self._roots.values(), *every]:
            is_right = node.keys == sorted(node.children) == sorted(child.tokens for child in node.children.values())
            wrong += [] if is_right else [f"node of block {node.block}: children and their keys differ"]
        wrong += [f"root of salt {salt!r} is empty" for salt, root in self._roots.items() if not root.children]
        if (self.num_nodes, self.num_idle) != (len(every), sum(not node.refs for node in every)):
            wrong.append(f"counts {self.num_nodes} nodes, {self.num_idle} idle; there are {len(every)} nodes")
        return wrong

    def _root(self, salt: str | None) -> Node:
        root = self._roots.get(salt)
        if root is None:
            root = self._roots[salt] = Node((), -1, None, root_hash(salt))
        return root

    def _offer(self, node: Node) -> None:
        """Let eviction find the node, if it is an idle leaf."""
        if node.refs or node.children:
            return
        self._pushes += 1
        heapq.heappush(self._leaves, (node.priority, node.last_used, self._pushes, node))
        if len(self._leaves) > 4 * self.num_nodes + 64:
            self._leaves = [entry for entry in self._leaves if _is_current(entry)]
            heapq.heapify(self._leaves)

    def _expire(self, now_s: float) -> None:
        while self._expiries and self._expiries[0][0] <= now_s:
            expires_s, _, node = heapq.heappop(self._expiries)
            if node.parent is not None and node.expires_s == expires_s:
                node.priority, node.duration_s, node.expires_s = DEFAULT_RETENTION_PRIORITY, None, math.inf
                self._offer(node)
        if len(self._expiries) > 4 * self.num_nodes + 64:
            self._expiries = [entry for entry in self._expiries if entry[2].expires_s == entry[0]]
            heapq.heapify(self._expiries)


def _is_current(entry: tuple[int, int, int, Node]) -> bool:
    priority, last_used, _, node = entry
    is_idle_leaf = not node.refs and not node.children and node.parent is not None
    return is_idle_leaf and node.last_used == last_used and node.priority == priority


def _longest_common_prefix(keys: list[TokenTuple], query: TokenTuple) -> tuple[TokenTuple, int]:
    """The key that shares most leading tokens with `query`: it stands where `query` would go, or just before."""
    at = bisect.bisect_left(keys, query)
    best, best_length = keys[0], 0
    for key in keys[max(0, at - 1) : at + 1]:
        length = next(
            (i for i, (a, b) in enumerate(zip(key, query, strict=False)) if a != b), min(len(key), len(query))
        )
        if length > best_length:
            best, best_length = key, length
    return best, best_length
