"""From a checked body to jobs: prompts become token ids, fields become a sampling spec, n becomes n sequences."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

from tensorweave.cluster.errors import ModelNotFound, RequestRejected
from tensorweave.cluster.protocol import GenerateRequest, ModelInfo, SamplingSpec
from tensorweave.router.answers import Answer, AnswerHead, ChatAnswer, CompletionAnswer
from tensorweave.router.choices import ChoiceStream, Prompt
from tensorweave.router.detokenize import IncrementalDetokenizer
from tensorweave.router.disaggregated import check_phase
from tensorweave.router.field_types import MAX_LOGPROBS
from tensorweave.router.generation import Job
from tensorweave.router.openai import (
    DEFAULT_COMPLETION_TOKENS,
    ChatCompletionRequest,
    CompletionRequest,
)
from tensorweave.router.parsing import parse_request
from tensorweave.router.request_names import RequestNames
from tensorweave.router.sampling import check_prompt, nth_seed, resolve_sampling
from tensorweave.router.service import RouterService
from tensorweave.router.token_shapes import TokenShapes

AnyRequest = CompletionRequest | ChatCompletionRequest

# What `resolve_sampling` calls by another name than the bodies do.
_FIELD_NAMES: Final = {"bad_token_ids": "bad_words"}


@dataclass(frozen=True, slots=True)
class Plan:
    """All that the answer to one HTTP request needs. Job i belongs to prompt i // num_sequences; n of each are told."""

    jobs: Sequence[Job]
    choices: Sequence[ChoiceStream]
    answer: Answer
    prompt_lens: Sequence[int]
    n: int
    num_sequences: int
    is_streamed: bool
    includes_usage: bool
    has_running_usage: bool
    has_output: bool
    is_context_only: bool

    def best(self) -> list[int]:
        """The jobs to tell, once all have ended: of each prompt the n of highest mean log-probability."""
        if self.n == self.num_sequences:
            return list(range(len(self.jobs)))
        best: list[int] = []
        for first in range(0, len(self.jobs), self.num_sequences):
            places = range(first, first + self.num_sequences)
            best += sorted(places, key=lambda place: -self.choices[place].mean_logprob)[: self.n]
        return best


async def plan_completion(service: RouterService, body: bytes, client_id: str | None = None) -> Plan:
    """`client_id`: the client's own name for the request; should it ask again under it, it gets the same answer."""
    request = parse_request(CompletionRequest, body)
    check_model(service, request.model)
    info = await service.info()
    _check_count(service, request, len(request.prompts))
    prompts = [await _completion_prompt(service, request, prompt) for prompt in request.prompts]
    names = RequestNames(f"cmpl-{secrets.token_hex(16)}", client_id)
    answer = CompletionAnswer(_head("text_completion", names, request), request.telling, TokenShapes(service.tokenizer))
    return _plan(service, info, request, prompts, answer, names)


async def plan_chat(service: RouterService, body: bytes, client_id: str | None = None) -> Plan:
    request = parse_request(ChatCompletionRequest, body)
    check_model(service, request.model)
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
    prompt = Prompt(_cut(token_ids, request.truncate_prompt_tokens))
    names = RequestNames(f"chatcmpl-{secrets.token_hex(16)}", client_id)
    answer = ChatAnswer(_head("chat.completion", names, request), request.telling, TokenShapes(service.tokenizer))
    return _plan(service, info, request, [prompt], answer, names)


async def _completion_prompt(service: RouterService, request: CompletionRequest, prompt: str | list[int]) -> Prompt:
    """A text is echoed as it came, unless it is cut."""
    token_ids = prompt
    if isinstance(token_ids, str):
        add_special = request.add_special_tokens is not False
        token_ids = await service.tokenizer.encode_async(token_ids, add_special_tokens=add_special)
    cut = _cut(token_ids, request.truncate_prompt_tokens)
    if not request.echo:
        return Prompt(cut)
    if isinstance(prompt, str) and len(cut) == len(token_ids):
        return Prompt(cut, prompt)
    check_prompt(cut, await service.info())
    return Prompt(cut, service.tokenizer.decode(cut, skip_special_tokens=request.skip_special_tokens is not False))


def _cut(token_ids: list[int], num_kept: int | None) -> list[int]:
    return token_ids if num_kept is None else token_ids[-num_kept:]


def _head(kind: str, names: RequestNames, request: AnyRequest) -> AnswerHead:
    return AnswerHead(kind, names.answer_id, int(time.time()), request.model, includes_usage=request.includes_usage)


def check_model(service: RouterService, model: str) -> None:
    if model != service.model_name:
        raise ModelNotFound(
            f"the model {model[:256]!r} does not exist; this server has {service.model_name!r}", param="model"
        )


def _check_count(service: RouterService, request: AnyRequest, num_prompts: int) -> None:
    wanted, limit = num_prompts * request.num_sequences, service.limits.max_sequences
    if wanted > limit:
        name = "prompt" if num_prompts > 1 else "n" if request.num_sequences == request.n else "best_of"
        raise RequestRejected(f"the request asks for {wanted} sequences; the limit is {limit}", param=name)


def _plan(
    service: RouterService,
    info: ModelInfo,
    request: AnyRequest,
    prompts: Sequence[Prompt],
    answer: Answer,
    names: RequestNames,
) -> Plan:
    phase, telling = request.disaggregated_params, request.telling
    if phase is not None:
        if not service.accepts_phases:
            raise RequestRejected(
                "disaggregated_params is not enabled here (security.enable_disaggregated_params)",
                param="disaggregated_params",
            )
        check_phase(request, phase, len(prompts))
    jobs: list[Job] = []
    choices: list[ChoiceStream] = []
    for prompt in prompts:
        spec = _sampling(service, info, request, prompt.token_ids, names)
        for i in range(request.num_sequences):
            own = spec if spec.is_greedy or request.num_sequences == 1 else replace(spec, seed=nth_seed(spec.seed, i))
            choices.append(
                ChoiceStream(
                    len(jobs),
                    telling,
                    prompt,
                    service.tokenizer,
                    skip_special_tokens=request.skip_special_tokens is not False,
                )
            )
            jobs.append(_job(service, info, request, names, len(jobs), prompt.token_ids, own))
    return Plan(
        jobs=jobs,
        choices=choices,
        answer=answer,
        prompt_lens=[len(prompt.token_ids) for prompt in prompts],
        n=request.n or 1,
        num_sequences=request.num_sequences,
        is_streamed=bool(request.stream),
        includes_usage=request.includes_usage,
        has_running_usage=request.has_running_usage,
        has_output=telling.has_output,
        is_context_only=phase is not None and phase.is_context_only,
    )


def _sampling(
    service: RouterService, info: ModelInfo, request: AnyRequest, prompt: Sequence[int], names: RequestNames
) -> SamplingSpec:
    telling, own_names, max_tokens = request.telling, dict(_FIELD_NAMES), request.max_tokens
    if isinstance(request, ChatCompletionRequest):
        param, default_max_tokens = "messages", None
        own_names["logprobs"] = "top_logprobs"
        if request.prompt_token_ids is not None:
            param = "prompt_token_ids"
        if request.max_completion_tokens is not None:
            max_tokens, own_names["max_tokens"] = request.max_completion_tokens, "max_completion_tokens"
    else:
        param, default_max_tokens = "prompt", DEFAULT_COMPLETION_TOKENS
    check_prompt(prompt, info, param=param)
    words = [ids for word in request.bad_words or () for ids in service.tokenizer.word_ids(word)]
    try:
        return resolve_sampling(
            request.sampling(telling, max_tokens=max_tokens if telling.has_output else 1, bad_token_ids=words),
            prompt_len=len(prompt),
            info=info,
            default_max_tokens=default_max_tokens,
            prompt_param=param,
            draw_seed=names.draw_seed,
            max_logprobs=MAX_LOGPROBS,
        )
    except RequestRejected as error:
        if error.param in own_names:
            name = own_names[error.param]
            raise type(error)(error.message.replace(error.param, name), param=name) from None
        raise


def _job(
    service: RouterService,
    info: ModelInfo,
    request: AnyRequest,
    names: RequestNames,
    index: int,
    prompt: Sequence[int],
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
    end_ids = frozenset() if request.ignore_eos else frozenset(info.end_ids)  # else asked for by stop_token_ids
    job = Job(index, generate, detokenizer, end_ids, request.session)
    phase = request.disaggregated_params
    if phase is None or not phase.is_generation_only:
        return job
    state, first_tokens = phase.handed_over(info.vocab_size)
    generate = replace(generate, sampling=replace(spec, seed=state.seed), fetch=state.ticket, grace_s=0.0)
    return replace(job, request=generate, first_tokens=first_tokens)
