"""`EmbeddingsEndpoint`: POST /v1/embeddings, from the body to the answer."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Final

import orjson
from starlette.types import Receive, Scope, Send

from tensorweave.cluster.protocol import GenerateRequest, SamplingSpec
from tensorweave.router.bodies.embedding_body import EmbeddingBody
from tensorweave.router.bodies.tasks import EMBEDDING
from tensorweave.router.dispatch.timeline import Timeline
from tensorweave.router.http import asgi
from tensorweave.router.http.boundary import RequestBoundary
from tensorweave.router.http.metrics import RouterMetrics
from tensorweave.router.http.request_record import RequestRecord
from tensorweave.router.openai.embedding_answer import encode_embedding, whole_answer
from tensorweave.router.service import RouterService

_AT_ONCE: Final = 64
"""Inputs of one request that run at the same time: one request may have more than the service admits."""
_SPEC: Final = SamplingSpec(max_tokens=1, wants_embedding=True)


class EmbeddingsEndpoint:
    """An ASGI application."""

    def __init__(self, path: str, service: RouterService, metrics: RouterMetrics) -> None:
        self._boundary = RequestBoundary(path, metrics, service.recorders)
        self._service = service
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._boundary.run(scope, send, lambda record: self._serve(scope, receive, send, record))

    async def _serve(self, scope: Scope, receive: Receive, send: Send, record: RequestRecord) -> None:
        service, limits = self._service, self._service.limits
        with service.body_memory.share() as share:
            body = await asgi.read_json_body(
                scope, receive, share, max_bytes=limits.max_body_bytes, timeout_s=limits.body_timeout_s
            )
            async with asgi.cancelled_on_disconnect(receive):
                asked = await service.bodies.run(EMBEDDING, body, await service.served_for_embeddings())
                del body
                share.release()
                num_tokens = sum(map(len, asked.inputs))
                record.model, record.num_prompt_tokens = service.model_name, num_tokens
                record.timelines = timelines = [Timeline() for _ in asked.inputs]
                self._metrics.count_prompt(num_tokens)
                async with self._embeddings(asked, timelines, asgi.api_key_name(scope)) as embeddings:
                    await asgi.send_json(send, whole_answer(service.model_name, embeddings, num_tokens))

    @asynccontextmanager
    async def _embeddings(
        self, asked: EmbeddingBody, timelines: Sequence[Timeline], key: str
    ) -> AsyncIterator[Sequence[orjson.Fragment]]:
        """One per input, as JSON. If one fails, the others are cancelled."""
        places, name = asyncio.Semaphore(_AT_ONCE), f"embd-{secrets.token_hex(16)}"

        async def embed(index: int, token_ids: Sequence[int]) -> orjson.Fragment:
            async with places:
                request = self._request(f"{name}-{index}", token_ids, asked)
                packed = await self._service.dispatcher.embed(request, timelines[index], key=key)
            return encode_embedding(packed, asked.dimensions, is_base64=asked.is_base64)

        tasks = [asyncio.create_task(embed(index, token_ids)) for index, token_ids in enumerate(asked.inputs)]
        try:
            yield await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _request(self, request_id: str, token_ids: Sequence[int], asked: EmbeddingBody) -> GenerateRequest:
        limits = self._service.limits
        return GenerateRequest(
            request_id,
            token_ids,
            _SPEC,
            deadline_s=limits.default_deadline_s
            if asked.timeout_s is None
            else min(asked.timeout_s, limits.max_deadline_s),
            priority=asked.priority,
            cache_salt=asked.cache_salt,
        )
