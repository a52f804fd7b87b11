"""The prefix tree by hand-worked cases: matching, salts, and the order of eviction."""

from __future__ import annotations

from tensorweave.workers.kv.prefix_tree import Node, PrefixTree


def _chain(tree: PrefixTree, tokens: list[int], first_block: int, salt: str | None = None) -> list[Node]:
    """Nodes of two tokens each for all of `tokens`, each held once."""
    nodes: list[Node] = []
    for i in range(0, len(tokens), 2):
        pair = (tokens[i], tokens[i + 1])
        nodes.append(tree.insert(nodes[-1] if nodes else None, salt, pair, first_block + i // 2))
    return nodes


def _release(tree: PrefixTree, nodes: list[Node], now_s: float = 0.0) -> None:
    for node in reversed(nodes):
        tree.release(node, now_s)


def test_match_takes_whole_blocks_then_part_of_one() -> None:
    tree = PrefixTree(2, allow_partial=True)
    nodes = _chain(tree, [1, 2, 3, 4], 0)
    match = tree.match([1, 2, 3, 9], limit=4, salt=None)
    assert (match.nodes, match.partial, match.num_partial) == ((nodes[0],), nodes[1], 1)
    assert tree.match([1, 2, 3, 4, 5], limit=5, salt=None).nodes == tuple(nodes)


def test_match_stops_at_its_limit() -> None:
    tree = PrefixTree(2, allow_partial=True)
    nodes = _chain(tree, [1, 2, 3, 4], 0)
    match = tree.match([1, 2, 3, 4], limit=3, salt=None)
    assert (match.nodes, match.partial, match.num_partial) == ((nodes[0],), nodes[1], 1)
    assert tree.match([1, 2], limit=0, salt=None).nodes == ()


def test_partial_matches_can_be_off() -> None:
    tree = PrefixTree(2, allow_partial=False)
    _chain(tree, [1, 2], 0)
    assert tree.match([1, 9], limit=2, salt=None).partial is None


def test_the_longest_partial_match_wins_among_many_children() -> None:
    tree = PrefixTree(4, allow_partial=True)
    children = [(5, 5, 5, 5), (1, 2, 9, 9), (1, 2, 3, 9), (1, 1, 1, 1), (1, 3, 0, 0)]
    by_tokens = {tokens: tree.insert(None, None, tokens, block) for block, tokens in enumerate(children)}
    match = tree.match([1, 2, 3, 4], limit=4, salt=None)
    assert (match.partial, match.num_partial) == (by_tokens[1, 2, 3, 9], 3)
    assert tree.match([7, 7, 7, 7], limit=4, salt=None).partial is None


def test_a_salt_sees_only_its_own() -> None:
    tree = PrefixTree(2, allow_partial=True)
    (plain,) = _chain(tree, [1, 2], 0)
    (salted,) = _chain(tree, [1, 2], 1, salt="tenant")
    assert tree.match([1, 2, 3], 3, None).nodes == (plain,)
    assert tree.match([1, 2, 3], 3, "tenant").nodes == (salted,)
    assert tree.match([1, 2, 3], 3, "other").nodes == ()
    assert plain.digest != salted.digest


def test_digests_chain_the_tokens_before() -> None:
    tree = PrefixTree(2, allow_partial=True)
    first = _chain(tree, [1, 2, 5, 6], 0)
    second = _chain(tree, [3, 4, 5, 6], 2)
    assert first[1].tokens == second[1].tokens
    assert first[1].digest != second[1].digest
    again = _chain(PrefixTree(2, allow_partial=True), [1, 2, 5, 6], 7)
    assert [node.digest for node in again] == [node.digest for node in first]


def test_eviction_takes_leaves_of_the_least_recently_used_chain() -> None:
    tree = PrefixTree(2, allow_partial=True)
    old, young = _chain(tree, [1, 2, 3, 4], 0), _chain(tree, [5, 6, 7, 8], 2)
    _release(tree, old)
    _release(tree, young)
    tree.hold(old[0])
    tree.release(old[0], 0.0)
    assert [tree.evict(0.0).block for _ in range(4)] == [1, 3, 2, 0]
    assert tree.audit({}) == []
    assert (tree.num_nodes, tree.num_idle) == (0, 0)


def test_the_lowest_priority_goes_first_whatever_its_age() -> None:
    tree = PrefixTree(2, allow_partial=True)
    dear, plain, cheap = (_chain(tree, [i, i], block)[0] for block, i in enumerate([1, 2, 3]))
    tree.retain(dear, 80, None)
    tree.retain(cheap, 0, None)
    _release(tree, [cheap, plain, dear])
    assert [tree.evict(0.0).block for _ in range(3)] == [2, 1, 0]


def test_a_cheap_parent_stays_while_its_dear_child_does() -> None:
    tree = PrefixTree(2, allow_partial=True)
    parent, child = _chain(tree, [1, 2, 3, 4], 0)
    (other,) = _chain(tree, [5, 6], 2)
    tree.retain(parent, 0, None)
    tree.retain(child, 90, None)
    _release(tree, [parent, child])
    _release(tree, [other])
    assert [tree.evict(0.0).block for _ in range(3)] == [2, 1, 0]


def test_a_priority_lasts_its_duration_after_the_last_use() -> None:
    def evicted_first(now_s: float) -> int:
        tree = PrefixTree(2, allow_partial=True)
        (dear,), (plain,) = _chain(tree, [1, 2], 0), _chain(tree, [3, 4], 1)
        tree.retain(dear, 80, 10.0)
        tree.release(dear, now_s=5.0)
        tree.release(plain, now_s=6.0)
        return tree.evict(now_s).block

    assert evicted_first(now_s=14.9) == 1
    assert evicted_first(now_s=15.0) == 0


def test_a_use_in_between_starts_the_duration_anew() -> None:
    tree = PrefixTree(2, allow_partial=True)
    (dear,), (plain,) = _chain(tree, [1, 2], 0), _chain(tree, [3, 4], 1)
    tree.retain(dear, 80, 10.0)
    _release(tree, [dear], now_s=0.0)
    tree.hold(dear)
    _release(tree, [dear], now_s=8.0)
    _release(tree, [plain], now_s=9.0)
    assert tree.evict(12.0).block == 1
    assert tree.evict(12.0).block == 0


def test_a_duration_does_not_run_while_a_block_is_in_use() -> None:
    tree = PrefixTree(2, allow_partial=True)
    (dear,), (first,), (plain,) = (_chain(tree, [i, i], block) for block, i in enumerate([1, 2, 3]))
    tree.retain(dear, 80, 10.0)
    _release(tree, [dear], now_s=0.0)
    tree.hold(dear)
    _release(tree, [first], now_s=5.0)
    assert tree.evict(12.0) is first
    _release(tree, [dear], now_s=20.0)
    _release(tree, [plain], now_s=21.0)
    assert tree.evict(25.0) is plain


def test_a_low_priority_ends_as_well() -> None:
    tree = PrefixTree(2, allow_partial=True)
    (plain,), (cheap,) = _chain(tree, [1, 2], 0), _chain(tree, [3, 4], 1)
    tree.retain(cheap, 0, 10.0)
    _release(tree, [plain], now_s=0.0)
    _release(tree, [cheap], now_s=1.0)
    assert tree.evict(11.0) is plain


def test_nothing_in_use_is_evicted() -> None:
    tree = PrefixTree(2, allow_partial=True)
    parent, child = _chain(tree, [1, 2, 3, 4], 0)
    tree.release(child, 0.0)
    assert tree.num_idle == 1
    assert tree.evict(0.0) is child
    assert tree.num_idle == 0
    assert tree.audit({parent: 1}) == []


def test_an_emptied_salt_leaves_no_root() -> None:
    tree = PrefixTree(2, allow_partial=True)
    for salt in ("a", "b", "c"):
        _release(tree, _chain(tree, [1, 2], 0, salt))
        tree.evict(0.0)
    assert tree._roots == {}


def test_many_uses_do_not_grow_the_heaps() -> None:
    tree = PrefixTree(2, allow_partial=True)
    (node,) = _chain(tree, [1, 2], 0)
    tree.retain(node, 50, 1e9)
    tree.release(node, 0.0)
    for _ in range(2000):
        tree.hold(node)
        tree.release(node, 0.0)
    tree.hold(tree.insert(node, None, (3, 4), 1))
    assert len(tree._leaves) <= 4 * tree.num_nodes + 65


def test_audit_sees_what_is_wrong() -> None:
    tree = PrefixTree(2, allow_partial=True)
    parent, child = _chain(tree, [1, 2, 3, 4], 0)
    assert tree.audit({parent: 1, child: 1}) == []
    assert any("held 2 times" in line for line in tree.audit({parent: 2, child: 1}))
    parent.refs = 0
    assert any("idle parent" in line for line in tree.audit({child: 1}))
    child.refs = 0
    assert any("eviction cannot find" in line for line in tree.audit({}))
