"""What the pools of a configuration need, what the cluster lacks for them, and what ranks receive."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tensorweave.cluster.cluster_resources import ClusterResources, NodeResources
from tensorweave.cluster.mesh import Mesh
from tensorweave.deploy.config import ServeConfig, load_config
from tensorweave.deploy.pools import explain_shortage, needed_resources, pool_specs


def make_config(tmp_path: Path, *overrides: str) -> ServeConfig:
    path = tmp_path / "service.yaml"
    path.write_text("model: m", encoding="utf-8")
    return load_config(path, overrides)


def test_what_the_pools_need_is_counted(tmp_path: Path) -> None:
    config = make_config(tmp_path, "pools.main.replicas=2", "pools.main.tensor_parallel_size=3", "engine.device=cuda")
    specs = pool_specs(config, has_gpus=False)
    assert needed_resources(specs) == {"CPU": 6.0, "GPU": 6.0}
    assert explain_shortage(specs, one_node({"CPU": 6.0, "GPU": 6.0})) is None
    assert explain_shortage(specs, one_node({"CPU": 8.0})) == (
        "the pools (main: 2 x 3 rank(s)) need 6 GPUs, and the Ray cluster has 0; "
        "by node: h: 8 of 8 CPU free, 0 of 0 GPU free"
    )


def test_a_sum_that_suffices_is_refused_where_no_node_has_a_rank(tmp_path: Path) -> None:
    specs = pool_specs(make_config(tmp_path, "pools.main.tensor_parallel_size=2", "engine.device=cuda"), has_gpus=True)
    nodes = [NodeResources(name, total, total) for name, total in (("cpus", {"CPU": 8.0}), ("gpus", {"GPU": 8.0}))]
    assert explain_shortage(specs, ClusterResources(nodes)) == (
        "pool main has 2 rank(s) with 1 CPU, 1 GPU each, every one on one node, and the nodes of the Ray cluster "
        "hold 0 such; by node: cpus: 8 of 8 CPU free, 0 of 0 GPU free; gpus: 0 of 0 CPU free, 8 of 8 GPU free"
    )


def one_node(total: dict[str, float]) -> ClusterResources:
    return ClusterResources([NodeResources("h", total, total)])


def test_pools_divide_experts_as_they_say(tmp_path: Path) -> None:
    config = make_config(
        tmp_path,
        *("pools.prefill.replicas=1", "pools.decode.tensor_parallel_size=4"),
        *("pools.decode.moe_expert_parallel_size=2", "pools.decode.moe_tensor_parallel_size=2"),
    )
    meshes = {spec.name: spec.gang.mesh for spec in pool_specs(config, has_gpus=False)}
    assert meshes == {"prefill": Mesh(), "decode": Mesh(tensor=4, expert=2)}
    with pytest.raises(ValueError, match=r"pools\.decode.* their product must be tensor_parallel_size"):
        make_config(tmp_path, "pools.prefill.replicas=1", "pools.decode.moe_expert_parallel_size=2")


def test_device_auto_takes_gpus_where_there_are_some(tmp_path: Path) -> None:
    config = make_config(tmp_path)
    assert pool_specs(config, has_gpus=True)[0].gang.gpus_per_rank == 1.0
    assert pool_specs(config, has_gpus=False)[0].gang.gpus_per_rank == 0.0


def test_gangs_share_a_gpu(tmp_path: Path) -> None:
    config = make_config(tmp_path, "pools.main.replicas=4", "engine.device=cuda", "engine.gpus_per_rank=0.25")
    specs = pool_specs(config, has_gpus=True)
    assert needed_resources(specs) == {"CPU": 4.0, "GPU": 1.0}
    assert explain_shortage(specs, one_node({"CPU": 4.0, "GPU": 1.0})) is None
    on_cpus = make_config(tmp_path, "engine.device=cpu", "engine.gpus_per_rank=0.25")
    assert pool_specs(on_cpus, has_gpus=True)[0].gang.gpus_per_rank == 0.0
    with pytest.raises(ValueError, match="need a whole GPU each"):
        make_config(tmp_path, "engine.gpus_per_rank=0.25", "engine.tensor_parallel_size=2")
    with pytest.raises(ValueError, match="gpus_per_rank"):
        make_config(tmp_path, "engine.gpus_per_rank=2")


def test_ranks_receive_what_was_written(tmp_path: Path) -> None:
    config = make_config(tmp_path, "engine.max_batch_size=7", "engine.kv_cache_config.max_tokens=64")
    args = pool_specs(config, has_gpus=False)[0].gang.args
    assert (args["max_batch_size"], args["kv_cache_config"]["max_tokens"]) == (7, 64)
    assert "replicas" not in args


HOSTS = ClusterResources(
    [
        NodeResources("10.0.0.1", {"CPU": 2.0}, {"CPU": 2.0}, "head"),
        NodeResources("10.0.0.2", {"CPU": 2.0}, {"CPU": 2.0}, "worker", {"zone": "b", "ray.io/node-id": "x"}),
    ]
)


def explain(tmp_path: Path, *overrides: str) -> str | None:
    return explain_shortage(pool_specs(make_config(tmp_path, *overrides), has_gpus=False), HOSTS)


def test_a_pool_may_only_use_the_nodes_of_its_placement(tmp_path: Path) -> None:
    assert explain(tmp_path, "pools.main.replicas=2", "pools.main.placement.nodes=[worker]") is None
    assert explain(tmp_path, "pools.main.replicas=3", "pools.main.placement.labels.zone=b") == (
        "pool main has 3 rank(s) with 1 CPU each, every one on one node, and the nodes of the Ray cluster that "
        "placement.labels (zone: b) allows hold 2 such; by node: 10.0.0.2: 2 of 2 CPU free"
    )
    assert explain(tmp_path, "pools.main.placement.nodes=[10.0.0.9]") == (
        "pool main has 1 rank(s) with 1 CPU each, every one on one node, and the nodes of the Ray cluster that "
        "placement.nodes (10.0.0.9) allows hold 0 such; there is no such node; nodes: 10.0.0.1 (head); "
        "10.0.0.2 (worker, zone=b)"
    )


def test_ranks_on_nodes_of_their_own_need_so_many_nodes(tmp_path: Path) -> None:
    spread = "pools.main.placement.spread=ranks"
    assert explain(tmp_path, spread, "pools.main.tensor_parallel_size=2") is None
    assert explain(tmp_path, spread, "pools.main.tensor_parallel_size=3") == (
        "pool main has gangs of 3 ranks, each on a node of its own (placement.spread: ranks), and 2 of the nodes of "
        "the Ray cluster have room for one; by node: 10.0.0.1: 2 of 2 CPU free; 10.0.0.2: 2 of 2 CPU free"
    )


def test_mistakes_of_a_placement_are_named(tmp_path: Path) -> None:
    for wrong, message in (
        ("placement.labels={a b: c}", "is no label"),
        ("placement.labels.zone='in(a)'", "is no value of a label"),
        ("placement.labels.zone=[]", "has no value"),
        ("placement.nodes=['']", "has no name"),
        ("placement.spread=all", "'none', 'gangs' or 'ranks'"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            make_config(tmp_path, f"pools.main.{wrong}")
