"""`disaggregated_params` over HTTP: a client sends the two phases of a request itself, to one service or to two.

A context_only answer has one token and what the generation_only request needs: the first token and, encoded, the ticket
for the prompt's KV and the seed. Its holder can fetch this prompt's KV once.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field

from tensorweave.cluster.errors import RequestRejected
from tensorweave.cluster.opaque_state import OpaqueState
from tensorweave.cluster.protocol import Ticket
from tensorweave.router.openai.field_types import Integer, Integers
from tensorweave.router.text.choices import Telling

RequestType = Literal["context_only", "generation_only", "context_and_generation"]

_PARAM: Final = "disaggregated_params"
_ID_BITS: Final = 63
_MAX_FIRST_TOKENS: Final = 1024
_MAX_STATE_CHARS: Final = 1 << 20
"""A ticket lists every rank of its gang and every block of its prompt."""


class DisaggregatedParams(BaseModel):
    """Which phase a request is, and the result of the phase before it."""

    model_config = ConfigDict(strict=True, extra="forbid", hide_input_in_errors=True)

    request_type: RequestType = Field(description="'context_and_generation' is an ordinary request.")
    first_gen_tokens: Integers | None = Field(
        None, max_length=_MAX_FIRST_TOKENS, description="What the context phase generated."
    )
    ctx_request_id: Integer | None = Field(None, description="Identifies the context phase in logs.")
    encoded_opaque_state: str | None = Field(
        None, max_length=_MAX_STATE_CHARS, description="The ticket for the prompt's KV, in base64."
    )
    disagg_request_id: Integer | None = Field(None, description="Identifies both phases in logs.")
    draft_tokens: Integers | None = Field(None, max_length=0, description="Accepted if empty.")

    @property
    def is_context_only(self) -> bool:
        return self.request_type == "context_only"

    @property
    def is_generation_only(self) -> bool:
        return self.request_type == "generation_only"

    def handed_over(self, vocab_size: int) -> tuple[OpaqueState, Sequence[int]]:
        """What a generation phase continues with. Raises RequestRejected."""
        if self.encoded_opaque_state is None:
            raise _rejected("generation_only needs the context phase's", "encoded_opaque_state")
        tokens = self.first_gen_tokens
        if not tokens or not all(0 <= token < vocab_size for token in tokens):
            raise _rejected("generation_only needs the context phase's", "first_gen_tokens")
        try:
            return OpaqueState.unpack(base64.b64decode(self.encoded_opaque_state, validate=True)), tokens
        except (ValueError, binascii.Error) as error:
            raise _rejected(f"{error}:", "encoded_opaque_state") from None


class Sequences(Protocol):
    """What a request body specifies about its sequences."""

    stream: bool | None

    @property
    def num_sequences(self) -> int: ...

    @property
    def telling(self) -> Telling: ...

    @property
    def given_token_ids(self) -> tuple[str, bool]:
        """The field for a prompt as token ids, and whether it was given."""


def check_phase(request: Sequences, phase: DisaggregatedParams, num_prompts: int) -> None:
    """Raises RequestRejected for what a single phase does not support."""
    if phase.request_type == "context_and_generation":
        return
    if num_prompts * request.num_sequences != 1:
        raise RequestRejected(
            f"a {phase.request_type} request has one prompt and n 1", param="n" if num_prompts == 1 else "prompt"
        )
    if request.telling.has_echo:
        raise RequestRejected(f"a {phase.request_type} request has no echo", param="echo")
    if phase.is_context_only and request.stream:
        raise RequestRejected("a context_only answer is not streamed", param="stream")
    if not phase.is_generation_only:
        return
    if request.telling.num_prompt_logprobs is not None:
        raise RequestRejected("only a context phase has the prompt's log-probabilities", param="prompt_logprobs")
    name, is_given = request.given_token_ids
    if not is_given:
        raise RequestRejected(
            f"a generation_only request needs the prompt_token_ids of the context phase's answer as {name}", param=name
        )


@dataclass(frozen=True, slots=True)
class ContextPhase:
    """What a context phase's answer has for the generation phase: the prompt, and the parameters unless the request
    has ended."""

    prompt: Sequence[int]
    params: DisaggregatedParams | None

    @property
    def choice_fields(self) -> dict[str, Any]:
        return {_PARAM: None if self.params is None else self.params.model_dump(exclude_none=True)}


def params_of(ticket: Ticket, first_tokens: Sequence[int], seed: int) -> DisaggregatedParams:
    """The parameters that the generation phase must send."""
    return DisaggregatedParams(
        request_type="context_only",
        first_gen_tokens=list(first_tokens),
        ctx_request_id=int(ticket.ticket_id[:16], 16) >> (64 - _ID_BITS),
        encoded_opaque_state=base64.b64encode(OpaqueState(ticket, seed).pack()).decode(),
    )


def _rejected(text: str, field: str) -> RequestRejected:
    return RequestRejected(f"{text} {field}", param=f"{_PARAM}.{field}")
