"""Whether the processes of a gang are of one version: what would differ else is found out late, or never."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from tensorweave.cluster.protocol import PROTOCOL_VERSION


@dataclass(frozen=True, slots=True)
class Versions:
    """Of the package, and of the protocol that its processes speak."""

    package: str
    protocol: int

    @classmethod
    def here(cls) -> Self:
        return cls(sys.modules["tensorweave"].__version__, PROTOCOL_VERSION)  # the front door is not ours to import

    def to_wire(self) -> list[Any]:
        return [self.package, self.protocol]

    @classmethod
    def from_wire(cls, fields: Any) -> Self | None:
        """None for what no version of ours would say."""
        match fields:
            case [str(package), int(protocol)]:
                return cls(package, protocol)
        return None

    def __str__(self) -> str:
        return f"tensorweave {self.package} (protocol {self.protocol})"


def explain_mix(own: Versions, others: Mapping[str, Versions | None]) -> str | None:
    """Which of `others` are not of our version; those that cannot say theirs (None) are older. None if all are."""
    told = [
        f"{name} has {'an older version' if versions is None else versions}"
        for name, versions in others.items()
        if versions != own
    ]
    if not told:
        return None
    return f"{'; '.join(told)}; the supervisor has {own}: install the same version on every host"
