"""`tensorweave bench ttft`: the cost of prefilling a prompt at another gang, and when the router stops doing so.

Two gangs of one rank in this process. Each prompt is answered by the decode gang alone and by both gangs, alternately,
each time with its own prefix cache. The prefill gang's first token is sent at once, so the second token is measured
too: it waits for the KV. Then the joint policy decides, from the speeds measured here, how it would route a prompt of
each length to an idle decode gang and to busy ones.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass
from typing import Any, Final

from tensorweave.cli.bench_engine import engine_options
from tensorweave.cli.figures import aligned, publish, report, settings_of
from tensorweave.cli.prompts import random_prompts, vocab_size_of
from tensorweave.cluster.fleet import StaticFleet
from tensorweave.cluster.llm_args import TorchLlmArgs
from tensorweave.cluster.protocol import GenerateRequest, KvSource, SamplingSpec
from tensorweave.router.dispatch.dispatch import Dispatcher
from tensorweave.router.dispatch.kv_view import PromptView
from tensorweave.router.dispatch.loads import Loads
from tensorweave.router.dispatch.policy import Joint, Options, Route
from tensorweave.workers.build import build_executor
from tensorweave.workers.executor.executor import PyExecutor
from tensorweave.workers.executor.local import LocalLink
from tensorweave.workers.gang.comm import SoloComm
from tensorweave.workers.store.model_store import resolve_model

NUM_DECODING: Final = (0, 1, 4, 16)
_SECRET: Final = "a bench"
_NUM_TOKENS: Final = 4
_NUM_WARMUPS: Final = 2


def run_ttft(args: argparse.Namespace) -> int:
    directory = resolve_model(args.model)
    llm_args = TorchLlmArgs(model=directory, cache_transceiver_config={"backend": "TCP"}, **engine_options(args))
    with _executor(llm_args) as prefill, _executor(llm_args) as decode:
        lengths = [n for n in args.input_lens if n + _NUM_TOKENS <= decode.info.max_seq_len]
        rows, switches = asyncio.run(_measure(prefill, decode, lengths, vocab_size_of(directory), args))
    print(_table(rows))
    print(_table(switches))
    publish(report("ttft", settings_of(args), {"runs": {"ttft": rows, "switch": switches}}), args.json)
    return 0


@contextmanager
def _executor(args: TorchLlmArgs) -> Iterator[PyExecutor]:
    executor = build_executor(args, SoloComm(), transfer_secret=_SECRET)
    executor.start()
    try:
        yield executor
    finally:
        executor.shutdown()


class _FixedPolicy:
    """Routes to the decode gang alone, or to both if `is_joint`."""

    is_joint = False

    def route(self, options: Options) -> Route:
        return Route(options.prefill[0] if self.is_joint else None, options.decode[0])


@dataclass(frozen=True, slots=True)
class _Times:
    first_s: float
    second_s: float


async def _measure(
    prefill: PyExecutor, decode: PyExecutor, lengths: Sequence[int], vocab_size: int, args: argparse.Namespace
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    assert prefill.kv_endpoint is not None
    sender = LocalLink(prefill, KvSource("prefill", (prefill.kv_endpoint,), prefill.kv_fingerprint, _SECRET))
    receiver = LocalLink(decode)
    sender.gang_id, receiver.gang_id = "prefill", "decode"
    policy = _FixedPolicy()
    fleet = StaticFleet({"prefill": [sender], "decode": [receiver]})
    dispatcher = Dispatcher(fleet, policy)
    rows = []
    for length in lengths:
        times: dict[bool, list[_Times]] = {False: [], True: []}
        prompts = random_prompts(_NUM_WARMUPS + args.num_prompts, length, vocab_size, args.seed + length)
        for turn, prompt in enumerate(prompts):
            for is_joint in (False, True) if turn % 2 else (True, False):
                policy.is_joint = is_joint
                times[is_joint].append(await _ask(dispatcher, prompt, f"{length}-{turn}-{is_joint}"))
        rows.append({"prompt tokens": length, **_row(times[False][_NUM_WARMUPS:], times[True][_NUM_WARMUPS:])})
    switches = [_choice(dispatcher.loads, sender, receiver, length, vocab_size) for length in lengths]
    await fleet.close()
    return rows, switches


async def _ask(dispatcher: Dispatcher, prompt: list[int], name: str) -> _Times:
    """`name` separates its cache from that of the same prompt on the other route."""
    request = GenerateRequest(name, prompt, SamplingSpec(max_tokens=_NUM_TOKENS), cache_salt=name)
    began_s, came_s = time.perf_counter(), list[float]()
    async with aclosing(dispatcher.generate(request)) as chunks:
        async for chunk in chunks:
            came_s += [time.perf_counter() - began_s] * len(chunk.token_ids)
    return _Times(came_s[0], came_s[1])


def _row(alone: Sequence[_Times], joint: Sequence[_Times]) -> dict[str, float]:
    """Milliseconds. Differences are medians over prompts, each against itself."""
    row = {}
    for name, attribute in (("first", "first_s"), ("second", "second_s")):
        one, other = ([getattr(times, attribute) * 1e3 for times in way] for way in (alone, joint))
        row[f"{name}, one gang"] = statistics.median(one)
        row[f"{name}, two gangs"] = statistics.median(other)
        row[f"{name}, cost"] = statistics.median(b - a for a, b in zip(one, other, strict=True))
    return row


def _choice(loads: Loads, sender: LocalLink, receiver: LocalLink, length: int, vocab_size: int) -> dict[str, Any]:
    """The estimates and decisions of the joint policy with this many sequences decoding already."""
    prompt = random_prompts(1, length, vocab_size, seed=-1)[0]
    request = GenerateRequest("asked", prompt, SamplingSpec(max_tokens=_NUM_TOKENS))
    policy = Joint()
    row: dict[str, Any] = {"prompt tokens": length}
    load = loads.of(receiver.gang_id)
    before = dataclasses.asdict(load)["num_decoding"]
    for num_decoding in NUM_DECODING:
        load.num_decoding = num_decoding
        options = Options([sender], [receiver], PromptView(request), loads)
        alone_s, pair_s = policy.alone_s(receiver, options), policy.pair_s(Route(sender, receiver), options)
        way = "two" if policy.route(options).prefill is not None else "one"
        row[f"{num_decoding} decoding"] = f"{way} ({alone_s * 1e3:.1f} : {pair_s * 1e3:.1f} ms)"
    load.num_decoding = before
    return row


def _table(rows: Sequence[dict[str, Any]]) -> str:
    cells = [[f"{value:.2f}" if isinstance(value, float) else str(value) for value in row.values()] for row in rows]
    return aligned([list(rows[0]), *cells]) + "\n" if rows else ""
