"""`ReadRequest`: what a receiving rank asks of a sending rank, and `BlockHeader`, which describes each block sent."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from tensorweave.cluster.errors import WireError
from tensorweave.cluster.protocol import pack_tokens
from tensorweave.workers.step.request import LlmRequest


@dataclass(frozen=True, slots=True)
class BlockHeader:
    """A block on offer: its index in the prompt, its generation (see `BlockGenerations`), and how many of its tokens
    belong to the prompt."""

    index: int
    generation: int
    num_tokens: int

    def to_wire(self) -> list[int]:
        return [self.index, self.generation, self.num_tokens]

    @classmethod
    def from_wire(cls, fields: Any) -> BlockHeader:
        match fields:
            case [int(index), int(generation), int(num_tokens)]:
                return cls(index, generation, num_tokens)
        raise WireError("malformed block header")


@dataclass(frozen=True, slots=True)
class ReadRequest:
    """A read of KV heads [first_head, first_head + num_heads) of all layers: of the blocks from `first_block` on, or of
    the blocks `only`.

    `prompt_digest` names the tokens, and the adapter, that the blocks must be for. A read of no head returns the first
    token alone. A read that `ends_lease` releases the ticket when it is closed or its connection breaks.
    """

    read_id: str
    ticket_id: str
    fingerprint: dict[str, str]
    prompt_digest: str
    first_head: int
    num_heads: int
    first_block: int
    only: tuple[int, ...] = ()
    ends_lease: bool = False

    def to_wire(self) -> list[Any]:
        """All but `read_id`: a connection numbers its reads."""
        heads = [self.first_head, self.num_heads]
        blocks = [self.first_block, self.only]
        return [self.ticket_id, self.fingerprint, self.prompt_digest, *heads, *blocks, self.ends_lease]

    @classmethod
    def from_wire(cls, fields: list[Any]) -> ReadRequest:
        match fields:
            case [str(ticket), dict(fingerprint), str(digest), int(head), int(num), int(block), list(only), bool(ends)]:
                is_natural = all(type(n) is int and n >= 0 for n in [head, num, block, *only])
                if is_natural and all(isinstance(text, str) for pair in fingerprint.items() for text in pair):
                    return cls("", ticket, fingerprint, digest, head, num, block, tuple(only), ends)
        raise WireError("malformed read request")


def prompt_digest(request: LlmRequest) -> str:
    """A digest of the tokens that the request computes before its first generated token, and of its adapter."""
    tokens, adapter = pack_tokens(request.tokens[: request.context_len]), request.adapter_digest or b""
    return blake2b(tokens + adapter, digest_size=16, person=b"adapter" if adapter else b"").hexdigest()
