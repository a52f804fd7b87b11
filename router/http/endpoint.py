"""`GenerateEndpoint`: one POST route, from the body to the last byte of its answer, streamed or whole.

It is the request boundary: every error is answered with the error object of the route's API, or, once a stream has
begun, with an error event.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import logging
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Final

from starlette.types import Receive, Scope, Send

from tensorweave.cluster.errors import DeadlineExceeded, RequestCancelled, TensorweaveError
from tensorweave.cluster.protocol import FinishReason
from tensorweave.router.bodies.request_body import RequestBody
from tensorweave.router.bodies.tasks import BodyTask
from tensorweave.router.deadline import Deadline
from tensorweave.router.http import asgi
from tensorweave.router.http.boundary import INTERNAL_ERROR, RequestBoundary
from tensorweave.router.http.metrics import RouterMetrics
from tensorweave.router.http.request_record import RequestRecord
from tensorweave.router.openai.disaggregated import ContextPhase, params_of
from tensorweave.router.openai.prepare import Plan, make_plan
from tensorweave.router.openai.schemas import Usage
from tensorweave.router.service import RouterService
from tensorweave.router.text.generation import TextDelta, generate_all, generate_first
from tensorweave.router.time_slice import TimeSlice

logger = logging.getLogger(__name__)

_MAX_STALL_S: Final = 60.0  # a client that reads nothing for so long counts as gone


class RequestStats:
    """Tokens, cached tokens and times of one HTTP request so far, for its usage and for metrics."""

    def __init__(self, plan: Plan, metrics: RouterMetrics, record: RequestRecord) -> None:
        self._plan = plan
        self._metrics = metrics
        self._record = record
        self._started_s = record.began_s
        record.is_streamed = plan.is_streamed
        record.num_prompt_tokens = sum(plan.prompt_lens)
        record.timelines = [job.timeline for job in plan.jobs]
        self._first_s: list[float] = [0.0] * len(plan.jobs)
        self._latest_s: list[float] = [0.0] * len(plan.jobs)
        self._cached = [0] * len(plan.jobs)
        self.num_tokens = [0] * len(plan.jobs)

    def add(self, delta: TextDelta) -> None:
        """Count a delta. Raises DeadlineExceeded or RequestCancelled if the sequence ended that way."""
        index, now_s = delta.index, time.perf_counter()
        if delta.num_tokens:
            if not self.num_tokens[index]:
                self._first_s[index] = now_s
                self._record.first_token_s = self._record.first_token_s or now_s
                self._metrics.observe_first_token(now_s - self._started_s, delta.num_tokens)
            else:
                self._metrics.observe_step(now_s - self._latest_s[index], delta.num_tokens)
            self._latest_s[index] = now_s
            self.num_tokens[index] += delta.num_tokens
            self._record.num_output_tokens += delta.num_tokens
        if delta.num_cached_tokens > self._cached[index]:  # the second gang of a pair may report more
            self._metrics.count_cached(delta.num_cached_tokens - self._cached[index])
            self._cached[index] = delta.num_cached_tokens
            self._record.num_cached_tokens = self.num_cached
        if delta.finish_reason is not None:
            self._record.finish_reasons.append(delta.finish_reason)
            self._metrics.observe_end(
                delta.finish_reason,
                total_s=now_s - self._started_s,
                after_first_s=self._latest_s[index] - self._first_s[index],
                num_tokens=self.num_tokens[index],
            )
        if delta.finish_reason == "timeout":
            raise DeadlineExceeded(f"the request's deadline passed after {sum(self.num_tokens)} tokens")
        if delta.finish_reason == "cancelled":
            raise RequestCancelled("the request was cancelled")

    def fail(self, error: TensorweaveError) -> None:
        """The error has ended an answer that had begun."""
        self._record.error_code = error.code
        self._metrics.count_error(error)

    def usage(self) -> Usage:
        return self._usage(sum(self.num_tokens))

    def prompt_usage(self) -> Usage:
        """Usage before the answer's first token."""
        return self._usage(0)

    @property
    def num_cached(self) -> int:
        """A prompt counts once for all of its sequences, and so do its cached tokens."""
        return sum(self._cached[:: self._plan.num_sequences])

    def _usage(self, num_tokens: int) -> Usage:
        cached = self.num_cached
        reasoning = min(num_tokens, sum([choice.num_reasoning_tokens for choice in self._plan.choices]))
        return Usage.of(prompt=sum(self._plan.prompt_lens), completion=num_tokens, cached=cached, reasoning=reasoning)


class GenerateEndpoint:
    """An ASGI application for one path. `task` reads its body."""

    def __init__(
        self,
        path: str,
        task: BodyTask[RequestBody],
        service: RouterService,
        metrics: RouterMetrics,
    ) -> None:
        self._boundary = RequestBoundary(path, metrics, service.recorders)
        self._task = task
        self._service = service
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._boundary.run(scope, send, lambda record: self._serve(scope, receive, send, record))

    async def _serve(self, scope: Scope, receive: Receive, send: Send, record: RequestRecord) -> None:
        limits = self._service.limits
        with self._service.body_memory.share() as share:
            body = await asgi.read_json_body(
                scope, receive, share, max_bytes=limits.max_body_bytes, timeout_s=limits.body_timeout_s
            )
            async with asgi.cancelled_on_disconnect(receive):
                plan = await make_plan(
                    self._service, self._task, body, asgi.client_request_id(scope), asgi.api_key_name(scope)
                )
                del body
                share.release()
                record.model = self._service.model_name
                await self._answer(plan, RequestStats(plan, self._metrics, record), scope, send)

    async def _answer(self, plan: Plan, stats: RequestStats, scope: Scope, send: Send) -> None:
        self._metrics.count_prompt(sum(plan.prompt_lens))
        if plan.is_context_only:
            await self._answer_context(plan, stats, send)
            return
        async with aclosing(self._deltas(plan, stats)) as deltas:
            if plan.is_streamed:
                first = await anext(deltas)  # before it, an error is answered with its own HTTP status
                await self._stream(plan, stats, first, deltas, scope, send)
            else:
                await self._answer_whole(plan, stats, deltas, send)

    async def _deltas(self, plan: Plan, stats: RequestStats) -> AsyncGenerator[TextDelta, None]:
        """The deltas, counted. If only the prompt is wanted, the one token that is computed for it is left out."""
        time_slice = TimeSlice()
        async with aclosing(generate_all(self._service.dispatcher, plan.jobs, self._service.pace)) as deltas:
            async for delta in deltas:
                time_slice.resume()
                if not plan.has_output:
                    delta = _without_output(delta)
                stats.add(delta)
                yield delta
                await time_slice.checkpoint()

    async def _answer_context(self, plan: Plan, stats: RequestStats, send: Send) -> None:
        """Answer with the first token, and with what the generation phase needs to continue."""
        [job], [choice] = plan.jobs, plan.choices
        delta, ticket = await generate_first(self._service.dispatcher, job)
        stats.add(delta)
        piece = choice.add(delta)
        assert piece is not None, "a context phase's only delta has no finish reason"
        whole = plan.answer.new_choice()
        await whole.add(piece)
        params = None if ticket is None else params_of(ticket, delta.token_ids, job.request.sampling.seed)
        phase = ContextPhase(job.request.prompt_token_ids, params)
        await asgi.send_json(send, plan.answer.whole([whole], stats.usage(), phase))

    async def _answer_whole(
        self, plan: Plan, stats: RequestStats, deltas: AsyncGenerator[TextDelta, None], send: Send
    ) -> None:
        choices = [plan.answer.new_choice() for _ in plan.jobs]
        async for delta in deltas:
            if (piece := plan.choices[delta.index].add(delta)) is not None:
                await choices[delta.index].add(piece)
        await asgi.send_json(send, plan.answer.whole([choices[place] for place in plan.best()], stats.usage()))

    async def _stream(
        self,
        plan: Plan,
        stats: RequestStats,
        first: TextDelta,
        deltas: AsyncGenerator[TextDelta, None],
        scope: Scope,
        send: Send,
    ) -> None:
        async def event(delta: TextDelta) -> bytes:
            chunk = plan.choices[delta.index].add(delta)
            return b"" if chunk is None else await plan.answer.event(chunk, stats.usage)

        prompt = plan.jobs[0].request.prompt_token_ids
        opening = plan.answer.opening(len(plan.jobs), prompt, stats.prompt_usage())
        await asgi.start_events(send)
        try:
            await asgi.send_event(send, opening + await event(first))
            now_s = asyncio.get_running_loop().time
            with Deadline(now_s() + _MAX_STALL_S) as stalled:
                async for delta in deltas:
                    if events := await event(delta):
                        stalled.move(now_s() + _MAX_STALL_S)
                        await stalled.wait(functools.partial(asgi.send_event, send, events))
            await asgi.end_events(send, plan.answer.closing(stats.usage()))
        except TensorweaveError as error:
            stats.fail(error)
            await asgi.end_events(send, plan.answer.failure(error))
        except TimeoutError:
            raise asgi.ClientGone from None
        except (Exception, SystemExit):  # the request boundary, once the answer has begun
            logger.exception("request %s: internal error in a stream", asgi.request_id_of(scope))
            stats.fail(failure := TensorweaveError(INTERNAL_ERROR))
            await asgi.end_events(send, plan.answer.failure(failure))


def _without_output(delta: TextDelta) -> TextDelta:
    reason: FinishReason | None = "length" if delta.finish_reason == "stop" else delta.finish_reason
    return dataclasses.replace(delta, text="", token_ids=(), logprobs=(), finish_reason=reason, stop_reason=None)
