"""A replay through the router's dispatcher, and the schedulers and KV cache managers of simulated gangs."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

from tensorweave.cli.replay_figures import Outcome
from tensorweave.cli.replay_trace import Trace, TraceRequest
from tensorweave.cluster.errors import TensorweaveError
from tensorweave.cluster.fleet import StaticFleet
from tensorweave.cluster.kv_mirror import KvMirror
from tensorweave.cluster.link import FoundAttempt
from tensorweave.cluster.protocol import GenerateRequest, LinkMeasurement, ModelInfo, SamplingSpec, TokenChunk
from tensorweave.router.dispatch.admission import Limits
from tensorweave.router.dispatch.dispatch import Dispatcher
from tensorweave.router.dispatch.policy import PolicyName, build_policy
from tensorweave.workers.fakes.simulated_gang import CostModel, GangShape, SimulatedGang
from tensorweave.workers.leader.kv_journal import KvJournal

_TELL_EVERY = 1 << 20
"""The first token and the end are of interest."""


class SimulatedLink:
    """A `GangLink` without a network."""

    is_open = True
    is_quiet = False
    kv_source = None
    kv_links: Mapping[str, LinkMeasurement] = {}

    def __init__(self, gang_id: str, shape: GangShape, cost: CostModel) -> None:
        self.gang_id = gang_id
        self.info = ModelInfo("simulated", 1 << 30, 1 << 30, "none", shape.tokens_per_block, shape.num_blocks)
        self.num_inflight = 0
        self.kv = KvMirror(shape.tokens_per_block, shape.num_blocks)
        self.gang = SimulatedGang(shape, cost, self._note)
        self._journal = KvJournal()

    def _note(self, events: list[dict[str, Any]]) -> None:
        if (fields := self._journal.add(events)) is not None:
            self.kv.apply(["kv", *fields])

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenChunk, None]:
        chunks: asyncio.Queue[TokenChunk] = asyncio.Queue()
        self.num_inflight += 1
        try:
            self.gang.add(request, chunks.put_nowait)
            while True:
                chunk = await chunks.get()
                yield chunk
                if chunk.is_last:
                    return
        finally:
            self.num_inflight -= 1
            self.gang.cancel(request.request_id)

    def cancel(self, request_id: str) -> None:
        self.gang.cancel(request_id)

    async def find(self, request_id: str, timeout_s: float = 5.0) -> FoundAttempt | None:
        return None

    def attach(self, request_id: str) -> AsyncGenerator[TokenChunk, None]:
        raise AssertionError("nothing is found here")

    async def stats(self, timeout_s: float = 5.0) -> list[dict[str, Any]]:
        return []

    async def kv_events(self, timeout_s: float = 5.0) -> list[dict[str, Any]]:
        return []

    def close(self) -> None:
        pass


class Simulation:
    """`run` on a stepped loop. The router has `router_s` of work for each request, one after another."""

    def __init__(
        self,
        trace: Trace,
        num_gangs: int,
        shape: GangShape,
        cost: CostModel,
        policy: PolicyName,
        limits: Limits,
        router_s: float = 0.0,
    ) -> None:
        self._trace = trace
        self._router_s = router_s
        self._router_free_s = 0.0
        self.links = [SimulatedLink(f"gang-{i}", shape, cost) for i in range(num_gangs)]
        self._policy = build_policy(policy, draw=random.Random(0))
        self._limits = limits

    @property
    def busy_s(self) -> float:
        return sum(link.gang.busy_s for link in self.links)

    async def run(self) -> tuple[list[Outcome], float]:
        """The outcomes in the trace's order, and when the last request ended."""
        loop = asyncio.get_running_loop()
        dispatcher = Dispatcher(StaticFleet({"both": self.links}), self._policy, self._limits, loop.time)
        tasks = []
        for number, request in enumerate(self._trace.requests):
            await asyncio.sleep(request.arrival_s - loop.time())
            tasks.append(asyncio.create_task(self._ask(dispatcher, number, request)))
        outcomes = list(await asyncio.gather(*tasks))
        return outcomes, loop.time()

    async def _ask(self, dispatcher: Dispatcher, number: int, asked: TraceRequest) -> Outcome:
        now_s = asyncio.get_running_loop().time
        began_s, first_s, num_cached, num_output = now_s(), 0.0, 0, 0
        self._router_free_s = max(self._router_free_s, began_s) + self._router_s
        await asyncio.sleep(self._router_free_s - began_s)
        request = GenerateRequest(
            str(number),
            self._trace.plain_prompt(asked),
            SamplingSpec(max_tokens=asked.num_output),
            answer_every=_TELL_EVERY,
        )
        try:
            async with aclosing(dispatcher.generate(request)) as chunks:
                async for chunk in chunks:
                    if not num_output and chunk.token_ids:
                        first_s, num_cached = now_s() - began_s, chunk.num_cached_tokens
                    num_output += len(chunk.token_ids)
        except TensorweaveError as error:
            return Outcome(asked.num_prompt, error=error.code)
        return Outcome(asked.num_prompt, num_cached, num_output, first_s, now_s() - began_s)
