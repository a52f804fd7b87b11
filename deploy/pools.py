"""From a configuration to the pool specs that the supervisor starts, and to the resources that the cluster lacks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

from tensorweave.cluster.cluster_resources import ClusterResources
from tensorweave.cluster.gang_spec import GangSpec
from tensorweave.cluster.llm_args import gang_mesh
from tensorweave.cluster.pool_spec import PoolSpec
from tensorweave.deploy.config import ServeConfig
from tensorweave.deploy.config_tables import PoolConfig


def pool_specs(
    config: ServeConfig, *, has_gpus: bool, digests: Mapping[str, str] = MappingProxyType({})
) -> list[PoolSpec]:
    """`has_gpus`: whether the Ray cluster has any, which decides `device: auto`. `digests`: the model's, by pool."""
    return [
        PoolSpec(
            name,
            _gang_spec(pool, config, has_gpus, digests.get(name)),
            pool.replicas,
            max_faults=pool.max_faults,
            fault_window_s=pool.fault_window_s,
        )
        for name, pool in config.pools.items()
    ]


def _gang_spec(pool: PoolConfig, config: ServeConfig, has_gpus: bool, digest: str | None) -> GangSpec:
    limits = config.limits
    wants_gpu = pool.device == "cuda" or (pool.device == "auto" and has_gpus)
    return GangSpec(
        role=pool.role,
        mesh=gang_mesh(pool),
        args=pool.llm_args().model_dump(mode="json", exclude_unset=True),
        worker_options={"log": config.logging.settings()},
        gpus_per_rank=pool.gpus_per_rank if wants_gpu else 0.0,
        place_timeout_s=limits.place_timeout_s,
        start_timeout_s=limits.start_timeout_s,
        hang_timeout_s=pool.hang_timeout_s,
        model_digest=digest,
        transfer_network=config.network.transfer,
        tls=config.network.tls_files(),
        allow_plain_gangs=config.network.allow_plain_gangs,
        placement=pool.placement.rule(),
    )


def needed_resources(specs: Sequence[PoolSpec]) -> dict[str, float]:
    """The resources that all gangs of all pools reserve together."""
    need: dict[str, float] = {}
    for spec in specs:
        for resource, amount in spec.gang.bundle.items():
            need[resource] = need.get(resource, 0.0) + amount * spec.gang.mesh.size * spec.replicas
    return need


def roomy_cpus(config: ServeConfig) -> float:
    """The CPUs that Ray counts on a host of our own: for all gangs that the pools may have, and one more of each pool,
    so that new gangs start before old ones drain."""
    specs = pool_specs(config, has_gpus=False)
    most = [replace(spec, replicas=1 + (config.pools[spec.name].max_replicas or spec.replicas)) for spec in specs]
    return needed_resources(most).get("CPU", 1.0)


def explain_shortage(specs: Sequence[PoolSpec], resources: ClusterResources) -> str | None:
    """Why the cluster cannot hold the pools even when idle; None if it may."""
    needs = needed_resources(specs)
    short = [
        f"{amount:g} {resource}s, and the Ray cluster has {resources.total(resource):g}"
        for resource, amount in needs.items()
        if resources.total(resource) < amount
    ]
    pools = ", ".join(f"{spec.name}: {spec.replicas} x {spec.gang.mesh.size} rank(s)" for spec in specs)
    if short:
        return f"the pools ({pools}) need {' and '.join(short)}; {resources.describe_nodes(needs)}"
    return next(filter(None, (_explain_pool(spec, resources, needs) for spec in specs)), None)


def _explain_pool(spec: PoolSpec, resources: ClusterResources, needs: Mapping[str, float]) -> str | None:
    """Why the nodes that one pool may use cannot hold it."""
    rule, bundle = spec.gang.placement, spec.gang.bundle
    allowed = resources.allowed_by(rule)
    nodes = f"the nodes of the Ray cluster{allowed.describe_rule()}"
    each = ", ".join(f"{amount:g} {name}" for name, amount in bundle.items())
    num_ranks = spec.replicas * spec.gang.mesh.size
    if (most := allowed.num_bundles(bundle)) < num_ranks:
        return (
            f"pool {spec.name} has {num_ranks} rank(s) with {each} each, every one on one node, and {nodes} hold "
            f"{most} such; {_describe(allowed, resources, needs)}"
        )
    if rule.spread == "ranks" and (num_nodes := allowed.num_nodes_for(bundle)) < spec.gang.mesh.size:
        return (
            f"pool {spec.name} has gangs of {spec.gang.mesh.size} ranks, each on a node of its own "
            f"(placement.spread: ranks), and {num_nodes} of {nodes} have room for one; "
            f"{_describe(allowed, resources, needs)}"
        )
    return None


def _describe(allowed: ClusterResources, resources: ClusterResources, needs: Mapping[str, float]) -> str:
    """The nodes that a pool may use, or all of them if there is none."""
    return allowed.describe_nodes(needs) if allowed.nodes else f"there is no such node; {resources.describe_names()}"
