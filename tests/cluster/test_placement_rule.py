"""On which nodes a pool's gangs may be, and how several that are placed at once are spread."""

from __future__ import annotations

from tensorweave.cluster.placement_rule import NodeName, PlacementRule, PoolPlaces

NODE = NodeName("id1", "10.0.0.1", "host1", {"zone": "a", "ray.io/node-id": "id1"})


def test_nodes_are_known_by_address_or_host_name() -> None:
    assert PlacementRule().allows(NODE)
    assert PlacementRule(("10.0.0.1",)).allows(NODE)
    assert PlacementRule(("other", "host1")).allows(NODE)
    assert not PlacementRule(("10.0.0.10", "host")).allows(NODE)


def test_every_label_must_fit() -> None:
    assert PlacementRule(labels=(("zone", ("b", "a")),)).allows(NODE)
    assert not PlacementRule(labels=(("zone", ("a",)), ("disk", ("fast",)))).allows(NODE)
    assert not PlacementRule(("host1",), (("zone", ("b",)),)).allows(NODE)


def test_the_selector_is_rays() -> None:
    rule = PlacementRule(labels=(("zone", ("a",)), ("kind", ("h100", "h200"))))
    assert rule.selector() == {"zone": "a", "kind": "in(h100,h200)"}
    assert rule.selector(["id2", "id1"])["ray.io/node-id"] == "in(id1,id2)"
    assert PlacementRule().selector() == {}
    assert rule.describe() == "placement.labels (zone: a, kind: h100 or h200)"


def test_gangs_that_are_placed_at_once_go_to_different_nodes() -> None:
    places = PoolPlaces("pools/decode-")
    with places.claim_one(["a", "b", "c"], ["a"]) as first, places.claim_one(["a", "b", "c"], ["a"]) as second:
        assert [first, second] == ["b", "c"]
        with places.claim_one(["a", "b"], ["a"]) as third:
            assert third == "a"
    with places.claim_one(["a", "b"], ["a"]) as again:
        assert again == "b"
    with places.claim_one([], ["a"]) as none:
        assert none is None
