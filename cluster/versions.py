"""Checks that the processes of a gang run one version: other differences would be noticed late, or never."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from tensorweave.cluster.protocol import PROTOCOL_VERSION


@dataclass(frozen=True, slots=True)
class Versions:
    """The versions of the package and of the protocol between its processes."""

    package: str
    protocol: int

    @classmethod
    def here(cls) -> Self:
        package = sys.modules["tensorweave"]  # which this room may not import
        return cls(package.__version__, PROTOCOL_VERSION)

    def to_wire(self) -> list[Any]:
        return [self.package, self.protocol]

    @classmethod
    def from_wire(cls, fields: Any) -> Self | None:
        """None for anything that no version of this package sends."""
        match fields:
            case [str(package), int(protocol)]:
                return cls(package, protocol)
        return None

    def __str__(self) -> str:
        return f"tensorweave {self.package} (protocol {self.protocol})"


def explain_mix(own: Versions, others: Mapping[str, Versions | None]) -> str | None:
    """Describe which of `others` differ from our version; those without a version (None) are older. None if all are
    equal."""
    differences = [
        f"{name} has {'an older version' if versions is None else versions}"
        for name, versions in others.items()
        if versions != own
    ]
    if not differences:
        return None
    return f"{'; '.join(differences)}; the supervisor has {own}: install the same version on every host"
