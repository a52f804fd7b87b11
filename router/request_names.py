"""How a request's sequences are called at the gangs, and the seed of those that the client gave none."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

from tensorweave.cluster.protocol import SamplingSpec


@dataclass(frozen=True, slots=True)
class RequestNames:
    """Where the client has named the request, both follow from its name, and the name at the gang from prompt and
    sampling too: only the same request finds its answer again."""

    answer_id: str
    client_id: str | None

    def of(self, index: int, prompt: Sequence[int], spec: SamplingSpec, salt: str | None) -> str:
        if self.client_id is None:
            return f"{self.answer_id}-{index}"
        content = repr((self.client_id, list(prompt), spec, salt)).encode()
        digest = blake2b(content, digest_size=12).hexdigest()
        return f"{self.client_id.replace('/', '_')}-{digest}-{index}"

    def draw_seed(self, num_bits: int) -> int:
        if self.client_id is None:
            return secrets.randbits(num_bits)
        return int.from_bytes(blake2b(self.client_id.encode(), digest_size=8).digest()) >> (64 - num_bits)
