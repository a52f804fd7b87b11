"""From a body to jobs: its fields become a sampling spec for each prompt, n becomes n sequences."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from tensorweave.cluster.errors import RequestRejected
from tensorweave.cluster.protocol import GenerateRequest, ModelInfo, SamplingSpec
from tensorweave.router.bodies.request_body import AnyRequest, RequestBody
from tensorweave.router.bodies.tasks import CHAT, COMPLETION
from tensorweave.router.openai.answers import CHAT_SHAPE, COMPLETION_SHAPE, Answer, AnswerShape
from tensorweave.router.openai.disaggregated import check_phase
from tensorweave.router.openai.request_names import RequestNames
from tensorweave.router.openai.token_shapes import TokenShapes
from tensorweave.router.sampling.sampling import nth_seed
from tensorweave.router.service import RouterService
from tensorweave.router.text.choices import ChoiceStream
from tensorweave.router.text.detokenize import IncrementalDetokenizer
from tensorweave.router.text.generation import Job


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
    """`client_id`: the client's own name for the request; should it ask again under it after its router was lost, it
    gets the answer that was begun for it."""
    read = await service.bodies.run(COMPLETION, body, await service.served())
    return await _plan(service, read, COMPLETION_SHAPE, client_id)


async def plan_chat(service: RouterService, body: bytes, client_id: str | None = None) -> Plan:
    read = await service.bodies.run(CHAT, body, await service.served())
    return await _plan(service, read, CHAT_SHAPE, client_id)


def _names(kind: str, request: AnyRequest, client_id: str | None) -> RequestNames:
    """Of one phase alone there is nothing to find again: its ticket is used once."""
    phase = request.disaggregated_params
    is_one_phase = phase is not None and (phase.is_context_only or phase.is_generation_only)
    return RequestNames(f"{kind}-{secrets.token_hex(16)}", None if is_one_phase else client_id)


def _answer(service: RouterService, shape: AnswerShape, names: RequestNames, request: AnyRequest) -> Answer:
    return Answer(
        shape,
        request.telling,
        TokenShapes(service.tokenizer),
        answer_id=names.answer_id,
        created_s=int(time.time()),
        model_name=service.model_name,
        includes_usage=request.includes_usage,
    )


async def _plan(service: RouterService, read: RequestBody, shape: AnswerShape, client_id: str | None) -> Plan:
    """Gives way to the event loop between sequences: there may be hundreds, with a long prompt each."""
    request, prompts, info = read.request, read.prompts, await service.info()
    phase, telling, names = request.disaggregated_params, request.telling, _names(shape.id_prefix, request, client_id)
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
        spec = read.resolve_sampling(prompt, info, secrets.randbits)
        skips_special = request.skip_special_tokens is not False
        context = prompt.left_context(service.tokenizer, skip_special_tokens=skips_special)
        for i in range(request.num_sequences):
            own = spec if spec.is_greedy or request.num_sequences == 1 else replace(spec, seed=nth_seed(spec.seed, i))
            choices.append(
                ChoiceStream(
                    len(jobs),
                    telling,
                    prompt,
                    service.tokenizer,
                    context,
                    skip_special_tokens=skips_special,
                    spaces_between_special_tokens=request.spaces_between_special_tokens is not False,
                )
            )
            jobs.append(_job(service, info, request, names, len(jobs), prompt.token_ids, context, own))
            await asyncio.sleep(0)
    return Plan(
        jobs=jobs,
        choices=choices,
        answer=_answer(service, shape, names, request),
        prompt_lens=[len(prompt.token_ids) for prompt in prompts],
        n=request.n or 1,
        num_sequences=request.num_sequences,
        is_streamed=bool(request.stream),
        includes_usage=request.includes_usage,
        has_running_usage=request.has_running_usage,
        has_output=telling.has_output,
        is_context_only=phase is not None and phase.is_context_only,
    )


def _job(
    service: RouterService,
    info: ModelInfo,
    request: AnyRequest,
    names: RequestNames,
    index: int,
    prompt: Sequence[int],
    context: Sequence[int],
    spec: SamplingSpec,
) -> Job:
    limits = service.limits
    deadline_s = (
        limits.default_deadline_s if request.timeout_s is None else min(request.timeout_s, limits.max_deadline_s)
    )
    detokenizer = IncrementalDetokenizer(
        service.tokenizer,
        context,
        skip_special_tokens=request.skip_special_tokens is not False,
        spaces_between_special_tokens=request.spaces_between_special_tokens is not False,
        stop=request.stop_strings,
        include_stop_str_in_output=bool(request.include_stop_str_in_output),
        min_tokens=spec.min_tokens,
    )
    generate = GenerateRequest(
        names.of(index, prompt, spec, request.seed, request.cache_salt),
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
    generate = replace(generate, sampling=replace(spec, seed=state.seed), fetch=state.ticket)
    return replace(job, request=generate, first_tokens=first_tokens)
