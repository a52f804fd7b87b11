"""From a checked body to jobs: prompts become token ids, fields become a sampling spec, n becomes n sequences."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from tensorweave.cluster.errors import ModelNotFound, RequestRejected
from tensorweave.cluster.protocol import GenerateRequest, ModelInfo, SamplingSpec
from tensorweave.router.answers import Answer, ChatAnswer, CompletionAnswer
from tensorweave.router.detokenize import IncrementalDetokenizer
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


async def plan_completion(service: RouterService, body: bytes) -> Plan:
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
    return _plan(service, info, request, token_ids, answer_id, answer)


async def plan_chat(service: RouterService, body: bytes) -> Plan:
    request = parse_request(ChatCompletionRequest, body)
    _check_model(service, request.model)
    info = await service.info()
    _check_count(service, request, 1)
    token_ids = await service.tokenizer.chat_async(
        [message.for_template() for message in request.messages],
        add_generation_prompt=request.add_generation_prompt is not False,
        add_special_tokens=bool(request.add_special_tokens),
        template_kwargs=request.chat_template_kwargs,
    )
    answer_id = f"chatcmpl-{secrets.token_hex(16)}"
    answer = ChatAnswer(answer_id, int(time.time()), request.model, includes_usage=request.includes_usage)
    return _plan(service, info, request, [token_ids], answer_id, answer)


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
    answer_id: str,
    answer: Answer,
) -> Plan:
    n = request.n or 1
    cut = [p[-request.truncate_prompt_tokens :] if request.truncate_prompt_tokens else p for p in prompts]
    jobs: list[Job] = []
    for prompt in cut:
        spec = _sampling(info, request, prompt)
        for i in range(n):
            own = spec if spec.is_greedy or n == 1 else replace(spec, seed=nth_seed(spec.seed, i))
            jobs.append(_job(service, info, request, f"{answer_id}-{len(jobs)}", len(jobs), prompt, own))
    return Plan(
        jobs=jobs,
        answer=answer,
        prompt_lens=[len(prompt) for prompt in cut],
        n=n,
        is_streamed=bool(request.stream),
        includes_usage=request.includes_usage,
        has_running_usage=request.has_running_usage,
    )


def _sampling(info: ModelInfo, request: AnyRequest, prompt: Sequence[int]) -> SamplingSpec:
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
        )
    except RequestRejected as error:
        if error.param == "max_tokens":
            raise type(error)(error.message.replace("max_tokens", name), param=name) from None
        raise


def _job(
    service: RouterService,
    info: ModelInfo,
    request: AnyRequest,
    request_id: str,
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
        request_id, prompt, spec, deadline_s=deadline_s, priority=request.priority or 0, cache_salt=request.cache_salt
    )
    return Job(index, generate, detokenizer, frozenset(info.end_ids))
