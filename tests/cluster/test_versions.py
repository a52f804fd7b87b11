"""A gang of mixed versions is told apart, whatever the others say of themselves."""

from __future__ import annotations

from typing import Any

import pytest

import tensorweave
from tensorweave.cluster.protocol import PROTOCOL_VERSION
from tensorweave.cluster.versions import Versions, explain_mix

OURS = Versions("1.0", 2)


def test_this_process_has_the_packages_version() -> None:
    assert Versions.here() == Versions(tensorweave.__version__, PROTOCOL_VERSION)
    assert Versions.from_wire(Versions.here().to_wire()) == Versions.here()


def test_equal_versions_are_accepted() -> None:
    assert explain_mix(OURS, {"rank 0": Versions("1.0", 2), "rank 1": Versions("1.0", 2)}) is None


@pytest.mark.parametrize(
    ("other", "told"),
    [
        (Versions("1.0", 3), "tensorweave 1.0 (protocol 3)"),
        (Versions("1.1", 2), "tensorweave 1.1 (protocol 2)"),
        (None, "an older version"),
    ],
)
def test_differing_versions_are_named(other: Versions | None, told: str) -> None:
    assert explain_mix(OURS, {"rank 0": OURS, "rank 1 (pid 7 on h2)": other}) == (
        f"rank 1 (pid 7 on h2) has {told}; the supervisor has tensorweave 1.0 (protocol 2): "
        "install the same version on every host"
    )


@pytest.mark.parametrize("fields", [None, [], ["1.0"], ["1.0", "2"], [1, 2], {"package": "1.0"}, ["1.0", 2, 3]])
def test_a_malformed_version_is_none(fields: Any) -> None:
    assert Versions.from_wire(fields) is None
