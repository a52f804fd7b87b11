"""The hosts, and Ray over them. Figures are printed, and kept in the file that TENSORWEAVE_TEST_FIGURES names."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.hosts.network import Network, why_not
from tests.hosts.ray_cluster import RayCluster

FIGURES = "TENSORWEAVE_TEST_FIGURES"
HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    reason = why_not()
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.hosts)
            item.add_marker(pytest.mark.slow)
            if reason:
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def network() -> Iterator[Network]:
    with Network() as hosts:
        yield hosts


@pytest.fixture(scope="module")
def cluster(network: Network) -> Iterator[RayCluster]:
    with RayCluster(network) as ray:
        yield ray


@pytest.fixture
def note(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Report a figure of this test."""

    def write(text: str) -> None:
        line = f"{request.node.name}: {text}"
        print(line, flush=True)
        if path := os.environ.get(FIGURES):
            with open(path, "a", encoding="utf-8") as file:
                file.write(line + "\n")

    return write
