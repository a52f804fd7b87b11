"""From a body to jobs: one for each sequence of each prompt, with the seeds drawn."""

from __future__ import annotations

import asyncio
import itertools
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from tensorweave.cluster.block_hash import cache_key
from tensorweave.cluster.errors import RequestRejected
from tensorweave.cluster.protocol import Adapter, GenerateRequest, ModelInfo, SamplingSpec
from tensorweave.router.bodies.request_body import AnyRequest, RequestBody
from tensorweave.router.bodies.tasks import BodyTask
from tensorweave.router.chat.parsed_choice import ParsedChoice
from tensorweave.router.openai.answer import Answer
from tensorweave.router.openai.chat_form import chat_parser, shown_ids
from tensorweave.router.openai.chat_request import ChatCompletionRequest
from tensorweave.router.openai.disaggregated import DisaggregatedParams, check_phase
from tensorweave.router.openai.new_answer import ID_PREFIXES, new_answer
from tensorweave.router.openai.request_names import RequestNames
from tensorweave.router.sampling.resolution import SEED_BITS, nth_seed
from tensorweave.router.service import RouterService
from tensorweave.router.text.choices import ChoiceStream, Prompt
from tensorweave.router.text.detokenize import IncrementalDetokenizer
from tensorweave.router.text.generation import Job


@dataclass(frozen=True, slots=True)
class Plan:
    """All that the answer to one HTTP request needs. Job i belongs to prompt i // num_sequences; the answer has n
    sequences of each prompt."""

    jobs: Sequence[Job]
    choices: Sequence[ParsedChoice]
    answer: Answer
    prompt_lens: Sequence[int]
    n: int
    num_sequences: int
    is_streamed: bool
    has_output: bool
    is_context_only: bool

    def best(self) -> list[int]:
        """The jobs in the answer, once all have ended: for each prompt the n of highest mean log-probability."""
        if self.n == self.num_sequences:
            return list(range(len(self.jobs)))
        best: list[int] = []
        for first in range(0, len(self.jobs), self.num_sequences):
            places = range(first, first + self.num_sequences)
            best += sorted(places, key=lambda place: -self.choices[place].mean_logprob)[: self.n]
        return best


async def make_plan(
    service: RouterService,
    task: BodyTask[RequestBody],
    body: bytes,
    client_id: str | None,
    key: str,
) -> Plan:
    """`task` reads the body. `client_id`: the client's own name for the request. If it asks again under it after its
    router was lost, it gets the answer that was begun for it. `key`: the name of the client's API key.

    Yields to the event loop between sequences: there may be hundreds, with a long prompt each."""
    read = await service.bodies.run(task, body, await service.served())
    request, prompts, phase = read.request, read.prompts, read.request.disaggregated_params
    if phase is not None:
        _check_phase(service, request, phase, len(prompts))
    names = _names(ID_PREFIXES[read.api], request, client_id)
    planner = _Planner(service, await service.info(), request, names, service.adapter(request.model), key)
    for prompt, spec in zip(prompts, read.specs, strict=True):
        context = planner.left_context(prompt)
        for own in _own_specs(spec, request):
            planner.add(prompt, context, own)
            await asyncio.sleep(0)
    return Plan(
        jobs=planner.jobs,
        choices=planner.choices,
        answer=new_answer(service, read, names.answer_id),
        prompt_lens=[len(prompt.token_ids) for prompt in prompts],
        n=request.n or 1,
        num_sequences=request.num_sequences,
        is_streamed=bool(request.stream),
        has_output=request.telling.has_output,
        is_context_only=phase is not None and phase.is_context_only,
    )


def _check_phase(service: RouterService, request: AnyRequest, phase: DisaggregatedParams, num_prompts: int) -> None:
    if not service.accepts_phases:
        raise RequestRejected(
            "disaggregated_params is not enabled here (security.enable_disaggregated_params)",
            param="disaggregated_params",
        )
    check_phase(request, phase, num_prompts)


def _names(kind: str, request: AnyRequest, client_id: str | None) -> RequestNames:
    """One phase alone cannot be found again: its ticket is used once."""
    phase = request.disaggregated_params
    is_one_phase = phase is not None and (phase.is_context_only or phase.is_generation_only)
    return RequestNames(kind + secrets.token_hex(16), None if is_one_phase else client_id)


def _own_specs(spec: SamplingSpec, request: AnyRequest) -> Iterator[SamplingSpec]:
    """One spec for each sequence of a prompt. They differ in their seeds, which are drawn here if the client gave
    none."""
    if spec.is_greedy:
        yield from itertools.repeat(spec, request.num_sequences)
        return
    first = secrets.randbits(SEED_BITS) if request.seed is None else spec.seed
    for i in range(request.num_sequences):
        yield replace(spec, seed=nth_seed(first, i))


@dataclass(slots=True)
class _Planner:
    """Makes the jobs of one HTTP request, and the choices that they fill."""

    service: RouterService
    info: ModelInfo
    request: AnyRequest
    names: RequestNames
    adapter: Adapter | None
    key: str
    jobs: list[Job] = field(default_factory=list)
    choices: list[ParsedChoice] = field(default_factory=list)
    shown: frozenset[int] = field(init=False)

    def __post_init__(self) -> None:
        self.shown = frozenset()
        if isinstance(self.request, ChatCompletionRequest):
            self.shown = shown_ids(self.service.chat_format, self.request, self.service.tokenizer)

    @property
    def _adapter_digest(self) -> bytes | None:
        return None if self.adapter is None else self.adapter.digest

    @property
    def skips_special_tokens(self) -> bool:
        return self.request.skip_special_tokens is not False

    @property
    def spaces_special_tokens(self) -> bool:
        return self.request.spaces_between_special_tokens is not False

    def left_context(self, prompt: Prompt) -> Sequence[int]:
        return prompt.left_context(
            self.service.tokenizer, skip_special_tokens=self.skips_special_tokens, shown=self.shown
        )

    def add(self, prompt: Prompt, context: Sequence[int], spec: SamplingSpec) -> None:
        """One sequence more. `context`: the tokens that its text goes on from."""
        job = self._job(prompt.token_ids, context, spec)
        phase = self.request.disaggregated_params
        if phase is not None and phase.is_generation_only:
            state, first_tokens = phase.handed_over(self.info.vocab_size)
            sampling = replace(spec, seed=state.seed)
            request = replace(job.request, sampling=sampling, fetch=state.ticket)
            job = replace(job, request=request, first_tokens=first_tokens)
        self.jobs.append(job)
        self.choices.append(self._choice(job.index, prompt, context))

    def _choice(self, index: int, prompt: Prompt, context: Sequence[int]) -> ParsedChoice:
        service, request = self.service, self.request
        stream = ChoiceStream(
            index,
            request.telling,
            prompt,
            service.tokenizer,
            context,
            skip_special_tokens=self.skips_special_tokens,
            spaces_between_special_tokens=self.spaces_special_tokens,
            shown=self.shown,
        )
        if not isinstance(request, ChatCompletionRequest):
            return ParsedChoice(stream)
        parser = chat_parser(service.chat_format, request, prompt.token_ids, service.tokenizer)
        return ParsedChoice(stream, parser, shows_reasoning=request.include_reasoning is not False)

    def _job(self, prompt: Sequence[int], context: Sequence[int], spec: SamplingSpec) -> Job:
        request, limits, index = self.request, self.service.limits, len(self.jobs)
        timeout_s = request.timeout_s
        generate = GenerateRequest(
            self.names.of(index, prompt, spec, request.seed, cache_key(request.cache_salt, self._adapter_digest)),
            prompt,
            spec,
            deadline_s=limits.default_deadline_s if timeout_s is None else min(timeout_s, limits.max_deadline_s),
            priority=request.priority or 0,
            cache_salt=request.cache_salt,
            adapter=self.adapter,
            grace_s=0.0 if self.names.client_id is None else limits.reattach_grace_s,
        )
        end_ids = (
            frozenset() if request.ignore_eos else frozenset(self.info.end_ids)
        )  # else asked for by stop_token_ids
        return Job(index, generate, self._detokenizer(context, spec), end_ids, request.session, key=self.key)

    def _detokenizer(self, context: Sequence[int], spec: SamplingSpec) -> IncrementalDetokenizer:
        return IncrementalDetokenizer(
            self.service.tokenizer,
            context,
            skip_special_tokens=self.skips_special_tokens,
            spaces_between_special_tokens=self.spaces_special_tokens,
            shown=self.shown,
            stop=self.request.stop_strings,
            include_stop_str_in_output=bool(self.request.include_stop_str_in_output),
            min_tokens=spec.min_tokens,
        )
