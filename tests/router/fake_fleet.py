"""A fleet without gangs: each next token is a hash of the context, or scripted; links can be slow, fail and close."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from tensorweave.cluster.errors import NotReady, TensorweaveError, WorkerLost, error_from_wire
from tensorweave.cluster.fleet import serves
from tensorweave.cluster.kv_mirror import KvMirror
from tensorweave.cluster.link import FoundAttempt
from tensorweave.cluster.protocol import (
    Adapter,
    GenerateRequest,
    KvSource,
    LinkMeasurement,
    ModelInfo,
    Role,
    TokenChunk,
)
from tests.router.fake_logprobs import with_logprobs


@dataclass(frozen=True)
class Fault:
    """What goes wrong with one request, after so many tokens. `closes`: the link is gone from then on. A stall lasts
    until the link's `goes_on` is set."""

    kind: Literal["error", "cancelled", "short", "wrong", "hang", "stall"]
    after: int = 0
    error: TensorweaveError | None = None
    closes: bool = False


class FakeLink:
    """`faults` befall the requests in order, one each; `fail_after` befalls all."""

    def __init__(
        self,
        info: ModelInfo,
        *,
        gang_id: str = "gang-0",
        role: Role = "both",
        step_s: float = 0.0,
        script: Sequence[int] | None = None,
        tokens_per_step: int = 1,
        fail_after: int | None = None,
        error: TensorweaveError | None = None,
        num_cached: int = 0,
        faults: Sequence[Fault] = (),
        gives_kv: bool | None = None,
    ) -> None:
        self.gang_id = gang_id
        self.info = info
        self.role = role
        self.step_s = step_s
        self.script = script
        self.tokens_per_step = tokens_per_step
        self.fail_after = fail_after
        self.error = error or WorkerLost(f"gang {gang_id}: lost")
        self.num_cached = num_cached
        self.faults = list(faults)
        self.kv = KvMirror(info.tokens_per_block, info.num_blocks)
        self.kv_links: dict[str, LinkMeasurement] = {}
        gives_kv = role == "prefill" if gives_kv is None else gives_kv
        self.kv_source = KvSource(gang_id, (), {"model": "m"}, "secret") if gives_kv else None
        self.num_inflight = 0
        self.progress_age_s: float | None = 0.01
        self.is_open = True
        self.is_quiet = False
        self.requests: list[GenerateRequest] = []
        self.cancelled: list[str] = []
        self.released: list[str] = []
        self.held: dict[str, GenerateRequest] = {}
        self.begun: dict[str, list[TokenChunk]] = {}
        self.begun_seed = 0
        self.attached: list[str] = []
        self.attach_fails = False
        self.num_steps = 0
        self.has_cancelled = asyncio.Event()
        self.goes_on = asyncio.Event()

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenChunk, None]:
        fault = self.faults.pop(0) if self.faults else None
        num_before = request.num_replayed
        self.requests.append(request)
        if not self.is_open:
            raise WorkerLost(f"gang {self.gang_id}: closed")
        self.num_inflight += 1
        is_over = False
        try:
            tokens = list(request.prompt_token_ids)
            num_out = request.num_replayed
            while not is_over:
                await asyncio.sleep(self.step_s)
                self.num_steps += 1
                if self.fail_after is not None and num_out - num_before >= self.fail_after:
                    is_over = True
                    raise _copy(self.error)
                if fault is not None and num_out - num_before >= fault.after:
                    if fault.kind in ("error", "short"):
                        is_over = True
                    if (last := await self._befall(fault, request, num_out)) is not None:
                        is_over = True
                        yield last
                    if is_over:
                        return
                new, reason, stop = self._step(request, tokens, num_out)
                if fault is not None and fault.kind == "wrong" and num_out - num_before >= fault.after:
                    new = [token ^ 1 for token in new]
                if request.offer is not None and reason is None:
                    reason = "not_finished"
                    self.held[request.request_id] = request
                if request.sampling.wants_embedding:
                    yield TokenChunk(request.request_id, context_logits=fake_embedding(tokens, self.info).tobytes())
                tokens += new
                num_out += len(new)
                is_over = reason is not None
                chunk = TokenChunk(request.request_id, new, reason, stop, self.num_cached, start=num_out - len(new))
                yield with_logprobs(
                    chunk,
                    request.sampling,
                    request.prompt_token_ids,
                    is_first=num_out - len(new) == num_before,
                    vocab_size=self.info.vocab_size,
                )
        finally:
            self.num_inflight -= 1
            if not is_over:
                self.cancelled.append(request.request_id)
                self.has_cancelled.set()

    async def _befall(self, fault: Fault, request: GenerateRequest, num_out: int) -> TokenChunk | None:
        if fault.closes:
            self.is_open = False
        match fault.kind:
            case "error":
                raise _copy(fault.error or self.error)
            case "cancelled":
                return TokenChunk(request.request_id, finish_reason="cancelled", start=num_out)
            case "hang":
                await asyncio.sleep(5.0)
                self.is_open = False
                raise WorkerLost(f"gang {self.gang_id}: its leader was silent")
            case "stall":
                await self.goes_on.wait()
                return None
            case _:
                return None

    def cancel(self, request_id: str) -> None:
        self.released.append(request_id)
        self.held.pop(request_id, None)

    async def find(self, request_id: str, timeout_s: float = 5.0) -> FoundAttempt | None:
        return FoundAttempt(request_id, self.begun_seed) if request_id in self.begun else None

    async def attach(self, request_id: str) -> AsyncGenerator[TokenChunk, None]:
        """All of `begun`'s chunks, at the pace of a step each."""
        self.attached.append(request_id)
        if self.attach_fails:
            raise NotReady("there is nothing to attach to")
        for chunk in self.begun[request_id]:
            yield chunk
            await asyncio.sleep(self.step_s)

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


def _copy(error: Exception) -> Exception:
    """Tracebacks must not pile up on a shared one."""
    return error_from_wire(error.to_wire()) if isinstance(error, TensorweaveError) else error


def hash_token(tokens: Sequence[int], seed: int, info: ModelInfo) -> int:
    """Never an end-of-sequence id."""
    digest = hashlib.blake2b(repr((list(tokens), seed)).encode(), digest_size=8).digest()
    first = max(info.end_ids, default=-1) + 1
    return first + int.from_bytes(digest, "little") % (info.vocab_size - first)


def fake_embedding(tokens: Sequence[int], info: ModelInfo) -> npt.NDArray[np.float32]:
    """Not of length 1."""
    first = hash_token(tokens, 0, info)
    return np.arange(first, first + info.embedding_size, dtype="<f4")


class FakeFleet:
    def __init__(self, *links: FakeLink) -> None:
        self.all_links = list(links)
        self.is_ending = False
        self.adapters: dict[str, Adapter] = {}
        self.changed = asyncio.Event()

    def links(self, role: Role = "both") -> list[Any]:
        return [link for link in self.all_links if link.is_open and serves(link.role, role)]

    def open_links(self) -> list[FakeLink]:
        return [link for link in self.all_links if link.is_open]

    async def wait_ready(self, timeout_s: float) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                while not self.open_links():
                    await self.changed.wait()
                    self.changed.clear()
        except TimeoutError:
            raise NotReady("no gang is open") from None

    def check_open(self) -> None:
        if self.is_ending:
            raise NotReady("the service is shutting down")

    async def wait_link(self, timeout_s: float, role: Role | None = None) -> None:
        await self.wait_ready(timeout_s)

    def add(self, link: FakeLink) -> None:
        self.all_links.append(link)
        self.changed.set()

    async def describe(self) -> list[dict[str, Any]]:
        gauges = {"kv_cache_usage_perc": 0.25, "num_preemptions_total": 3.0, "kv_transfer_bytes_total": 12.0}
        gangs = [
            {"gang_id": link.gang_id, "ranks": [{"progress_age_s": link.progress_age_s, "gauges": gauges}]}
            for link in self.all_links
        ]
        return [{"pool": "main", "gangs": gangs, "failure": None, "trouble": None}]

    async def last_description(self) -> list[dict[str, Any]]:
        return await self.describe()

    async def close(self) -> None:
        for link in self.all_links:
            link.close()
