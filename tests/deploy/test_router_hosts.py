"""Where router replicas are, and their URLs."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from tensorweave.deploy import router_hosts
from tensorweave.deploy.config_router import RouterConfig
from tensorweave.deploy.router_hosts import replica_options, router_urls

NODES = [{"NodeManagerAddress": address} for address in ("10.0.0.3", "10.0.0.1", "10.0.0.2")]


@pytest.fixture(autouse=True)
def cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    context = SimpleNamespace(gcs_address="10.0.0.1:6379")
    monkeypatch.setattr(router_hosts, "live_nodes", lambda: NODES)
    monkeypatch.setattr(router_hosts.ray, "get_runtime_context", lambda: context)


def test_replicas_are_on_the_head() -> None:
    router = RouterConfig(host="10.0.0.1", replicas=2)
    options = replica_options(router)
    assert options["num_replicas"] == 2
    assert "node:__internal_head__" in options["ray_actor_options"]["resources"]
    assert router_urls(router) == ["http://10.0.0.1:8000", "http://10.0.0.1:8001"]


def test_one_is_on_each_host() -> None:
    router = RouterConfig(host="0.0.0.0", per_host=True)
    options = replica_options(router)
    assert (options["num_replicas"], options["max_replicas_per_node"]) == (3, 1)
    assert "resources" not in options["ray_actor_options"]
    assert router_urls(router) == ["http://10.0.0.1:8000", "http://10.0.0.3:8000", "http://10.0.0.2:8000"]
