"""`ConfigSource`: the file that a Serve application was built from, and whether it has changed since."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Self


@dataclass(frozen=True, slots=True)
class ConfigSource:
    """`serve deploy` does not read the file again while its own arguments stay the same."""

    path: Path
    digest: str

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Raises OSError."""
        absolute = Path(path).absolute()
        return cls(absolute, _digest(absolute))

    def notice(self) -> str | None:
        """A notice for the operator if the file has changed; None too if this host does not have the file."""
        try:
            is_same = _digest(self.path) == self.digest
        except OSError:
            return None
        if is_same:
            return None
        return (
            f"{self.path} has changed since this application was built, and `serve deploy` applies that only with "
            "other arguments: change `revision` among them"
        )


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
