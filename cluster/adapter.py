"""`Adapter`: a LoRA adapter as requests name it and services list it, and what `LoraConfig` sets of them.

The digest names the contents of its files: KV that was computed with it is kept and handed over under the digest, so
that an adapter that was loaded again under its old name never meets KV of the one before.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from tensorweave.cluster.errors import WireError
from tensorweave.cluster.fields import as_bytes, checked

DIGEST_BYTES: Final = 16
ADAPTER_PARAM: Final = "model"
"""What a worker's errors name as the wrong field: over HTTP an adapter is a model."""


@dataclass(frozen=True, slots=True)
class Adapter:
    """`path` is its directory on the ranks' hosts. Two with the same digest are the same adapter."""

    name: str
    digest: bytes
    path: str

    def to_wire(self) -> list[Any]:
        return [self.name, self.digest, self.path]

    @classmethod
    def from_wire(cls, fields: Any) -> Adapter:
        try:
            name, digest, path = fields
        except (TypeError, ValueError) as error:
            raise WireError(f"malformed adapter: {error}") from None
        if len(as_bytes(digest, "digest")) != DIGEST_BYTES:
            raise WireError(f"an adapter's digest has {len(digest)} bytes")
        return cls(checked(name, "name", str), digest, checked(path, "path", str))


def adapter_or_none(fields: Any) -> Adapter | None:
    """Read the field of a message."""
    return None if fields is None else Adapter.from_wire(fields)
