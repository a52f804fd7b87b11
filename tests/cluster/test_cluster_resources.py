"""What a cluster that cannot hold a gang is said to lack: what was asked, what there is, where, and who has it."""

from __future__ import annotations

from tensorweave.cluster.cluster_resources import ClusterResources, NodeResources, Reservation
from tensorweave.cluster.placement_rule import PlacementRule

RANK = {"CPU": 1.0, "GPU": 1.0}


def test_a_cluster_that_is_too_small_is_reported() -> None:
    resources = ClusterResources([NodeResources("10.0.0.1", {"CPU": 8.0, "GPU": 4.0}, {"CPU": 8.0, "GPU": 4.0})])
    assert resources.explain(RANK, 8, 20.0) == (
        "cannot place a gang of 8 rank(s) with 1 CPU, 1 GPU each within 20 s: the Ray cluster has 8 of 8 CPU free, "
        "4 of 4 GPU free on 1 node(s); missing: 4 GPU; the cluster is too small for it even when idle; "
        "by node: 10.0.0.1: 8 of 8 CPU free, 4 of 4 GPU free"
    )


def test_a_rank_must_fit_on_one_node() -> None:
    nodes = [NodeResources("cpus", {"CPU": 8.0}, {"CPU": 8.0}), NodeResources("gpus", {"GPU": 2.0}, {"GPU": 2.0})]
    assert ClusterResources(nodes).num_bundles(RANK) == 0
    text = ClusterResources(nodes).explain(RANK, 2, 20.0)
    assert "enough in sum, but no node has room for a whole rank; its nodes hold 0 such rank(s) even when idle" in text
    assert "by node: cpus: 8 of 8 CPU free, 0 of 0 GPU free; gpus: 0 of 0 CPU free, 2 of 2 GPU free" in text


def test_reservations_of_missing_resources_are_named() -> None:
    resources = ClusterResources(
        [NodeResources("10.0.0.1", {"CPU": 4.0}, {"CPU": 0.5})],
        [Reservation("training", {"CPU": 2.0}), Reservation("disks", {"disk": 1.0})],
    )
    text = resources.explain({"CPU": 1.0}, 2, 7.0)
    assert "missing: 1.5 CPU; others hold it" in text
    assert text.endswith(
        "; held by placement groups: training (2 CPU); held by actors and tasks outside of groups: 1.5 CPU"
    )


def test_the_list_of_nodes_is_shortened() -> None:
    resources = ClusterResources([NodeResources(f"n{number}", {"CPU": 1.0}, {"CPU": 0.0}) for number in range(1000)])
    assert resources.describe_nodes(["CPU"]).endswith("n7: 0 of 1 CPU free; and 992 more")


def test_only_the_nodes_that_a_rule_allows_are_counted() -> None:
    nodes = [NodeResources(name, {"CPU": 2.0}, {"CPU": 0.0}) for name in ("a", "b")]
    text = ClusterResources(nodes).allowed_by(PlacementRule(("b",))).explain({"CPU": 1.0}, 1, 20.0)
    assert "the Ray cluster has 0 of 2 CPU free on 1 node(s) that placement.nodes (b) allows; missing: 1 CPU" in text
    text = ClusterResources(nodes).allowed_by(PlacementRule(("c",))).explain({"CPU": 1.0}, 1, 20.0)
    assert text.endswith("; there is no such node")
