"""`OpaqueState`: what the first phase of a user's own disaggregated request passes to the second, as bytes.

It contains the ticket and the seed, so that both phases sample alike. Its holder can fetch that one prompt's KV.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import msgpack

from tensorweave.cluster.errors import WireError
from tensorweave.cluster.protocol import Ticket

_VERSION: Final = 1
MAX_STATE_BYTES: Final = 64 << 10


@dataclass(frozen=True, slots=True)
class OpaqueState:
    ticket: Ticket
    seed: int = 0

    def pack(self) -> bytes:
        packed: bytes = msgpack.packb([_VERSION, self.ticket.to_wire(), self.seed])
        return packed

    @classmethod
    def unpack(cls, data: bytes) -> OpaqueState:
        """Raises ValueError for bytes that `pack` has not returned."""
        if len(data) > MAX_STATE_BYTES:
            raise ValueError(f"opaque_state has {len(data)} bytes, at most {MAX_STATE_BYTES} are possible")
        try:
            match msgpack.unpackb(data, raw=False):
                case [version, list(ticket), int(seed)] if version == _VERSION and 0 <= seed < 2**63:
                    return cls(Ticket.from_wire(ticket), seed)
        except (ValueError, TypeError, msgpack.UnpackException, WireError) as error:
            raise ValueError(f"opaque_state is not a context phase's: {error}") from None
        raise ValueError("opaque_state is not a context phase's, or of another version")
