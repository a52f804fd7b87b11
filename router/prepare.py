"""From a checked body to jobs: prompts become token ids, fields become a sampling spec, n becomes n sequences."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b

from tensorweave.cluster.errors import ModelNotFound, RequestRejected
from tensorweave.cluster.protocol import GenerateRequest, ModelInfo, SamplingSpec
from tensorweave.router.answers import Answer, ChatAnswer, CompletionAnswer
from tensorweave.router.detokenize import IncrementalDetokenizer
from tensorweave.router.disaggregated import DisaggregatedParams
from tensorweave.router.generation import Job
from tensorweave.router.openai import (
    DEFAULT_COMPLETION_TOKENS,
    ChatCompletionRequest,
    CompletionRequest,
    parse_request,
)
from tensorweave.router.sampling import check_prompt, nth_seed, resolve_sampling
from tensorweave.router.service import RouterService

AnyRequest = CompletionRequest | ChatCompletionRequest


@dataclass(frozen=True, slots=True)
class Plan:
    """All that the answer to one HTTP request needs. Job i belongs to prompt i // n."""

    jobs: Sequence[Job]
    answer: Answer
    prompt_lens: Sequence[int]
    n: int
    is_streamed: bool
    includes_usage: bool
    has_running_usage: bool
    is_context_only: bool = False


@dataclass(frozen=True, slots=True)
class _Names:
    """How a request's sequences are called at the gangs, and the seed of those without one.

    Where the client has named the request, both follow from its name, and the name at the gang from prompt and sampling
    too: only the same request finds its answer again.
    """

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


async def plan_completion(service: RouterService, body: bytes, client_id: str | None = None) -> Plan:
    """`client_id`: the client's own name for the request; should it ask again under it, it gets the same answer."""
    request = parse_request(CompletionRequest, body)
    _check_model(service, request.model)
    info = await service.info()
    prompts = request.prompts
    _check_count(service, request, len(prompts))
    add_special = request.add_special_tokens is not False
    token_ids = [
        await service.tokenizer.encode_async(p, add_special_tokens=add_special) if isinstance(p, str) else p
        for p in prompts
    ]
    answer_id = f"cmpl-{secrets.token_hex(16)}"
    answer = CompletionAnswer(answer_id, int(time.time()), request.model, includes_usage=request.includes_usage)
    return _plan(service, info, request, token_ids, answer, _Names(answer_id, client_id))


async def plan_chat(service: RouterService, body: bytes, client_id: str | None = None) -> Plan:
    request = parse_request(ChatCompletionRequest, body)
    _check_model(service, request.model)
    info = await service.info()
    _check_count(service, request, 1)
    token_ids = request.prompt_token_ids
    if token_ids is None:
        token_ids = await service.tokenizer.chat_async(
            [message.for_template() for message in request.messages],
            add_generation_prompt=request.add_generation_prompt is not False,
            add_special_tokens=bool(request.add_special_tokens),
            template_kwargs=request.chat_template_kwargs,
        )
    answer_id = f"chatcmpl-{secrets.token_hex(16)}"
    answer = ChatAnswer(answer_id, int(time.time()), request.model, includes_usage=request.includes_usage)
    return _plan(service, info, request, [token_ids], answer, _Names(answer_id, client_id))


def _check_model(service: RouterService, model: str) -> None:
    if model != service.model_name:
        raise ModelNotFound(
            f"the model {model[:256]!r} does not exist; this server has {service.model_name!r}", param="model"
        )


def _check_count(service: RouterService, request: AnyRequest, num_prompts: int) -> None:
    wanted, limit = num_prompts * (request.n or 1), service.limits.max_sequences
    if wanted > limit:
        raise RequestRejected(
            f"the request asks for {wanted} sequences; the limit is {limit}",
            param="n" if num_prompts == 1 else "prompt",
        )


def _plan(
    service: RouterService,
    info: ModelInfo,
    request: AnyRequest,
    prompts: Sequence[list[int]],
    answer: Answer,
    names: _Names,
) -> Plan:
    n = request.n or 1
    phase = request.disaggregated_params
    if phase is not None and not service.accepts_phases:
        raise RequestRejected(
            "disaggregated_params is not enabled here (security.enable_disaggregated_params)",
            param="disaggregated_params",
        )
    if phase is not None:
        _check_phase(request, phase, len(prompts))
    cut = [p[-request.truncate_prompt_tokens :] if request.truncate_prompt_tokens else p for p in prompts]
    jobs: list[Job] = []
    for prompt in cut:
        spec = _sampling(info, request, prompt, names)
        for i in range(n):
            own = spec if spec.is_greedy or n == 1 else replace(spec, seed=nth_seed(spec.seed, i))
            jobs.append(_job(service, info, request, names, len(jobs), prompt, own))
    return Plan(
        jobs=jobs,
        answer=answer,
        prompt_lens=[len(prompt) for prompt in cut],
        n=n,
        is_streamed=bool(request.stream),
        includes_usage=request.includes_usage,
        has_running_usage=request.has_running_usage,
        is_context_only=phase is not None and phase.is_context_only,
    )


def _check_phase(request: AnyRequest, phase: DisaggregatedParams, num_prompts: int) -> None:
    if phase.request_type == "context_and_generation":
        return
    if num_prompts * (request.n or 1) != 1:
        raise RequestRejected(
            f"a {phase.request_type} request has one prompt and n 1", param="n" if num_prompts == 1 else "prompt"
        )
    if phase.is_context_only and request.stream:
        raise RequestRejected("a context_only answer is not streamed", param="stream")
    given = request.prompt_token_ids if isinstance(request, ChatCompletionRequest) else request.prompt
    if phase.is_generation_only and not isinstance(given, list):
        name = "prompt_token_ids" if isinstance(request, ChatCompletionRequest) else "prompt"
        raise RequestRejected(
            f"a generation_only request needs the prompt_token_ids of the context phase's answer as {name}", param=name
        )


def _sampling(info: ModelInfo, request: AnyRequest, prompt: Sequence[int], names: _Names) -> SamplingSpec:
    if isinstance(request, ChatCompletionRequest):
        param, default_max_tokens = "messages", None
        name = "max_tokens" if request.max_completion_tokens is None else "max_completion_tokens"
        max_tokens = request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens
    else:
        param, default_max_tokens, name, max_tokens = (
            "prompt",
            DEFAULT_COMPLETION_TOKENS,
            "max_tokens",
            request.max_tokens,
        )
    check_prompt(prompt, info, param=param)
    try:
        return resolve_sampling(
            request.sampling(max_tokens=max_tokens),
            prompt_len=len(prompt),
            info=info,
            default_max_tokens=default_max_tokens,
            prompt_param=param,
            draw_seed=names.draw_seed,
        )
    except RequestRejected as error:
        if error.param == "max_tokens":
            raise type(error)(error.message.replace("max_tokens", name), param=name) from None
        raise


def _job(
    service: RouterService,
    info: ModelInfo,
    request: AnyRequest,
    names: _Names,
    index: int,
    prompt: list[int],
    spec: SamplingSpec,
) -> Job:
    limits = service.limits
    deadline_s = (
        limits.default_deadline_s if request.timeout_s is None else min(request.timeout_s, limits.max_deadline_s)
    )
    detokenizer = IncrementalDetokenizer(
        service.tokenizer,
        skip_special_tokens=request.skip_special_tokens is not False,
        spaces_between_special_tokens=request.spaces_between_special_tokens is not False,
        stop=request.stop_strings,
        include_stop_str_in_output=bool(request.include_stop_str_in_output),
        min_tokens=spec.min_tokens,
    )
    generate = GenerateRequest(
        names.of(index, prompt, spec, request.cache_salt),
        prompt,
        spec,
        deadline_s=deadline_s,
        priority=request.priority or 0,
        cache_salt=request.cache_salt,
        grace_s=0.0 if names.client_id is None else limits.reattach_grace_s,
    )
    job = Job(index, generate, detokenizer, frozenset(info.end_ids), request.session)
    phase = request.disaggregated_params
    return job if phase is None or not phase.is_generation_only else _generation_phase(job, phase, info)


def _generation_phase(job: Job, phase: DisaggregatedParams, info: ModelInfo) -> Job:
    state, first_tokens = phase.handed_over(info.vocab_size)
    sampling = replace(job.request.sampling, seed=state.seed)
    request = replace(job.request, sampling=sampling, fetch=state.ticket, grace_s=0.0)
    return replace(job, request=request, first_tokens=first_tokens)
