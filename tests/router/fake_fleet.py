"""A fleet without gangs: each next token is a hash of the context, or scripted; links can be slow, fail and close."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from tensorweave.cluster.errors import NotReady, TensorweaveError, WorkerLost
from tensorweave.cluster.protocol import GenerateRequest, ModelInfo, Role, TokenChunk


class FakeLink:
    def __init__(
        self,
        info: ModelInfo,
        *,
        gang_id: str = "gang-0",
        step_s: float = 0.0,
        script: Sequence[int] | None = None,
        tokens_per_step: int = 1,
        fail_after: int | None = None,
        error: TensorweaveError | None = None,
        num_cached: int = 0,
    ) -> None:
        self.gang_id = gang_id
        self.info = info
        self.step_s = step_s
        self.script = script
        self.tokens_per_step = tokens_per_step
        self.fail_after = fail_after
        self.error = error or WorkerLost(f"gang {gang_id}: lost")
        self.num_cached = num_cached
        self.num_inflight = 0
        self.progress_age_s: float | None = 0.01
        self.is_open = True
        self.requests: list[GenerateRequest] = []
        self.cancelled: list[str] = []
        self.num_steps = 0
        self.has_cancelled = asyncio.Event()

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenChunk, None]:
        self.requests.append(request)
        self.num_inflight += 1
        is_over = False
        try:
            tokens = list(request.prompt_token_ids)
            num_out = 0
            while not is_over:
                await asyncio.sleep(self.step_s)
                self.num_steps += 1
                if self.fail_after is not None and num_out >= self.fail_after:
                    is_over = True
                    raise self.error
                new, reason, stop = self._step(request, tokens, num_out)
                tokens += new
                num_out += len(new)
                is_over = reason is not None
                yield TokenChunk(request.request_id, new, reason, stop, self.num_cached)
        finally:
            self.num_inflight -= 1
            if not is_over:
                self.cancelled.append(request.request_id)
                self.has_cancelled.set()

    def _step(self, request: GenerateRequest, tokens: list[int], num_out: int) -> tuple[list[int], Any, int | None]:
        new: list[int] = []
        for _ in range(self.tokens_per_step):
            token = self._next(request, tokens + new, num_out + len(new))
            new.append(token)
            count = num_out + len(new)
            if token in request.sampling.stop_token_ids and count >= request.sampling.min_tokens:
                return new, "stop", token
            if count >= request.sampling.max_tokens:
                return new, "length", None
        return new, None, None

    def _next(self, request: GenerateRequest, tokens: list[int], num_out: int) -> int:
        if self.script is not None:
            return self.script[num_out] if num_out < len(self.script) else self.info.end_ids[0]
        return hash_token(tokens, request.sampling.seed, self.info)

    async def stats(self, timeout_s: float = 5.0) -> list[dict[str, Any]]:
        return [{"iter": self.num_steps}]

    def close(self) -> None:
        self.is_open = False


def hash_token(tokens: Sequence[int], seed: int, info: ModelInfo) -> int:
    """Never an end-of-sequence id."""
    digest = hashlib.blake2b(repr((list(tokens), seed)).encode(), digest_size=8).digest()
    first = max(info.end_ids, default=-1) + 1
    return first + int.from_bytes(digest, "little") % (info.vocab_size - first)


class FakeFleet:
    def __init__(self, *links: FakeLink) -> None:
        self.all_links = list(links)
        self.changed = asyncio.Event()

    def links(self, role: Role) -> list[Any]:
        return [link for link in self.all_links if link.is_open]

    async def wait_ready(self, timeout_s: float) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                while not self.links("both"):
                    await self.changed.wait()
                    self.changed.clear()
        except TimeoutError:
            raise NotReady("no gang is open") from None

    def add(self, link: FakeLink) -> None:
        self.all_links.append(link)
        self.changed.set()

    async def describe(self) -> list[dict[str, Any]]:
        gauges = {"kv_cache_usage_perc": 0.25, "num_preemptions_total": 3.0}
        gangs = [
            {"gang_id": link.gang_id, "ranks": [{"progress_age_s": link.progress_age_s, "gauges": gauges}]}
            for link in self.all_links
        ]
        return [{"pool": "main", "gangs": gangs, "failure": None, "trouble": None}]

    async def close(self) -> None:
        for link in self.all_links:
            link.close()
