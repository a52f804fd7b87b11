"""The two phases of a disaggregated request sent by hand: from `DisaggregatedParams` to what the dispatcher runs, and
back. A wrong field is a ValueError that names it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Final

from tensorweave.cluster.opaque_state import OpaqueState
from tensorweave.cluster.protocol import GenerateRequest, ModelInfo
from tensorweave.llmapi.completion_output import Update, as_dicts
from tensorweave.llmapi.disaggregated_params import DisaggregatedParams
from tensorweave.router.dispatch.dispatch import Dispatcher
from tensorweave.router.text.generation import Job, generate_first

_CONTEXT_TOKENS: Final = 2
"""A context phase samples one token. With a limit of one it would end by its length and hand nothing over."""
_ID_BITS: Final = 63


def resolve_phases(
    given: DisaggregatedParams | Sequence[DisaggregatedParams | None] | None, num_prompts: int
) -> list[DisaggregatedParams | None]:
    """One for each prompt."""
    if given is None:
        return [None] * num_prompts
    if not isinstance(given, DisaggregatedParams | Sequence):
        raise ValueError(f"disaggregated_params is a {type(given).__name__}, must be DisaggregatedParams or a list")
    if isinstance(given, DisaggregatedParams):
        if given.is_generation_only and num_prompts > 1:
            raise ValueError("a generation_only disaggregated_params belongs to one prompt: give a list of them")
        return [given] * num_prompts
    phases = list(given)
    if len(phases) != num_prompts:
        raise ValueError(f"{len(phases)} disaggregated_params for {num_prompts} prompts")
    return [*phases]


def as_phase(
    request: GenerateRequest, phase: DisaggregatedParams, info: ModelInfo, gives_kv: bool
) -> tuple[GenerateRequest, Sequence[int]]:
    """The request for this phase, and the tokens that its output begins with."""
    if not isinstance(phase, DisaggregatedParams):
        raise ValueError(f"disaggregated_params is a {type(phase).__name__}, must be DisaggregatedParams")
    phase = dataclasses.replace(phase)  # its fields may have been set since they were checked
    if phase.draft_tokens:
        raise ValueError("disaggregated_params.draft_tokens is not supported: draft tokens cannot be handed over")
    if phase.disagg_request_id is not None:
        request = dataclasses.replace(request, request_id=f"{request.request_id}-{phase.disagg_request_id}")
    if (wrong := _mismatch(request, phase)) is not None:
        raise ValueError(f"{wrong} in a {phase.request_type} request")
    if phase.is_context_only:
        if not gives_kv:
            raise ValueError(
                "context_only needs an LLM whose cache_transceiver_config has a backend, such as 'DEFAULT'"
            )
        return _context(request, info), ()
    if phase.is_generation_only:
        return _generation(request, phase, info)
    return request, ()


def _mismatch(request: GenerateRequest, phase: DisaggregatedParams) -> str | None:
    """What the request asks for that this phase cannot give; None if there is nothing."""
    sampling = request.sampling
    if phase.is_generation_only and sampling.needs_prompt_rows:
        return "prompt_logprobs and return_context_logits need the prompt's computation and cannot be used"
    return None


def _context(request: GenerateRequest, info: ModelInfo) -> GenerateRequest:
    sampling = request.sampling
    max_tokens = min(_CONTEXT_TOKENS, info.max_seq_len - len(request.prompt_token_ids))
    sampling = dataclasses.replace(sampling, max_tokens=max_tokens, min_tokens=min(sampling.min_tokens, max_tokens))
    return dataclasses.replace(request, sampling=sampling, offer=request.request_id)


def _generation(
    request: GenerateRequest, phase: DisaggregatedParams, info: ModelInfo
) -> tuple[GenerateRequest, Sequence[int]]:
    if phase.opaque_state is None:
        raise ValueError("generation_only needs the opaque_state that came with the context phase's output")
    first_tokens = phase.first_gen_tokens
    if not first_tokens or not all(isinstance(token, int) and 0 <= token < info.vocab_size for token in first_tokens):
        raise ValueError("generation_only needs the first_gen_tokens that came with the context phase's output")
    state = OpaqueState.unpack(phase.opaque_state)
    sampling = dataclasses.replace(request.sampling, seed=state.seed)
    return dataclasses.replace(request, sampling=sampling, fetch=state.ticket), tuple(first_tokens)


async def run_context_phase(dispatcher: Dispatcher, job: Job) -> Update:
    """Run a context phase. Return its token and, unless the request has ended, what the generation phase needs."""
    delta, ticket = await generate_first(dispatcher, job)
    phase = None
    if ticket is not None:
        phase = DisaggregatedParams(
            request_type="context_only",
            first_gen_tokens=list(delta.token_ids),
            first_gen_log_probs=as_dicts(delta.logprobs) or None,
            ctx_request_id=int(ticket.ticket_id[:16], 16) >> (64 - _ID_BITS),
            opaque_state=OpaqueState(ticket, job.request.sampling.seed).pack(),
        )
    return Update.of(delta, phase)
