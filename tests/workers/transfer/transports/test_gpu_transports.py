"""KV between GPUs by each transport, prefill in a process on one and decode in a process on the other, with kills."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tensorweave.cli.bench_transfer_fetches import SHAPES, Shape, fetch, make_carrier, running_sender
from tensorweave.cluster.errors import TransferFailed
from tensorweave.cluster.protocol import SamplingSpec
from tensorweave.workers.store.model_store import resolve_model
from tests.workers.engine_drive import random_prompts
from tests.workers.gang_process import GangProcess, Tokens, run_alone, run_pair, start_pair
from tests.workers.tiny_models import make_model

NUM_GPUS = torch.cuda.device_count()

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(NUM_GPUS < 2, reason=f"needs 2 CUDA GPUs, there are {NUM_GPUS}")]

BACKENDS = ["IPC", "NCCL", "TCP", "DEFAULT", "IPC_DIRECT"]
KNOBS = {"reuse": False, "max_num_tokens": 512, "kv_cache_config": {"max_tokens": 65536}}
Requests = tuple[list[list[int]], list[SamplingSpec]]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    make_model("llama_tied_9_over_3", path)
    return path


@pytest.fixture(scope="module")
def requests() -> Requests:
    rng = random.Random(7)
    prompts = [*random_prompts(12, 300), [5], [7, 8], *random_prompts(6, 2500, seed=1)]
    samplings = [
        SamplingSpec(max_tokens=rng.randint(1, 24), temperature=rng.choice([0.0, 0.9]), top_k=20, seed=i)
        for i in range(len(prompts))
    ]
    return prompts, samplings


@contextlib.contextmanager
def pair_of(path: Path, backend: str) -> Iterator[tuple[GangProcess, GangProcess]]:
    with (
        GangProcess(path, backend, 0, "P", **KNOBS) as prefill,
        GangProcess(path, backend, 1, "D", **KNOBS) as decode,
    ):
        yield prefill, decode


def check_same(prefill: GangProcess, decode: GangProcess, requests: Requests, want: list[Tokens]) -> None:
    before = decode.gauges()
    for name in ("one", "two"):
        assert run_pair(prefill, decode, *requests, name=f"{name}-{prefill.source.endpoints[0].port}-") == want
        prefill.wait_idle()
        decode.wait_idle()
    rise = {name: count - before[name] for name, count in decode.gauges().items() if name.startswith("kv_transfer")}
    assert rise["kv_transfer_blocks_total"] >= 2 * sum(len(prompt) // 16 for prompt in requests[0])
    assert rise["kv_transfer_recomputed_tokens_total"] == 0
    assert [name for name in rise if "failures" in name and rise[name]] == []


@pytest.mark.parametrize("backend", BACKENDS)
def test_tokens_and_kills(tiny: Path, requests: Requests, backend: str) -> None:
    """The tokens equal those of one gang, also after the prefill gang was killed during transfers, and with its
    successor."""
    with pair_of(tiny, backend) as (prefill, decode):
        want = run_alone(decode, *requests)
        check_same(prefill, decode, requests, want)
        link = decode.measure_link(prefill.source)
        assert link.error is None
        print(f"\n{backend}: {link.bytes_per_s / 1e9:.1f} GB/s, {link.latency_s * 1e6:.0f} us")

        many = [part * 4 for part in requests]
        ids = start_pair(prefill, decode, many[0], many[1], "killed")  # type: ignore[arg-type]
        decode.wait(ids[:2])
        prefill.kill()
        assert decode.wait(ids) == want * 4
        decode.wait_idle()
        print({name: count for name, count in decode.gauges().items() if "failures" in name and count})

        with GangProcess(tiny, backend, 0, "P2", **KNOBS) as another:
            check_same(another, decode, requests, want)
            ids = start_pair(another, decode, many[0], many[1], "orphaned")  # type: ignore[arg-type]
            decode.wait(ids[:2])
            decode.kill()
            assert run_alone(another, *requests) == want


@pytest.mark.parametrize("backend", ["IPC", "NCCL", "IPC_DIRECT"])
def test_no_fault_reaches_a_token(tiny: Path, requests: Requests, backend: str) -> None:
    """Bits are flipped, content is stale, messages are lost, cut and sent twice, and the connection dies."""
    faults = ("flip", "stale", "duplicate", "drop", "truncate", "die")
    with (
        GangProcess(tiny, backend, 0, "P", **KNOBS) as prefill,
        GangProcess(tiny, backend, 1, "D", faults=faults, **KNOBS) as decode,
    ):
        want = run_alone(decode, *requests)
        for number in range(4):
            assert run_pair(prefill, decode, *requests, name=f"faulty{number}-") == want
        decode.wait_idle()
        counted = {name: count for name, count in decode.gauges().items() if "failures" in name and count}
        print(counted)
        # Copies of the same blocks that run at once are verified one after the other, and none is a duplicate.
        kinds = ["digest", "missing", "peer_lost"] + ["duplicate"] * (backend != "IPC_DIRECT")
        assert [kind for kind in kinds if not counted.get(f"kv_transfer_failures_{kind}_total")] == []


def test_no_transport_in_common(tiny: Path, requests: Requests) -> None:
    with GangProcess(tiny, "IPC", 0, "P", **KNOBS) as prefill, GangProcess(tiny, "NCCL", 1, "D", **KNOBS) as decode:
        want = run_alone(decode, *requests)
        assert run_pair(prefill, decode, *requests, name="x") == want
        assert decode.gauges()["kv_transfer_blocks_total"] == 0


@pytest.mark.model
@pytest.mark.parametrize("backend", ["IPC", "NCCL", "IPC_DIRECT"])
def test_real_model(backend: str) -> None:
    rng = random.Random(3)
    prompts = [[rng.randrange(49000) for _ in range(n)] for n in (1, 15, 16, 17, 100, 700, 1500, 3000)]
    samplings = [SamplingSpec(max_tokens=32, temperature=0.0 if i % 2 else 0.8, seed=i) for i in range(len(prompts))]
    with pair_of(resolve_model("smollm2"), backend) as (prefill, decode):
        check_same(prefill, decode, (prompts, samplings), run_alone(decode, prompts, samplings))


@pytest.mark.parametrize(
    ("transport", "devices"),
    [
        ("ipc", "01"),
        ("ipc", "00"),
        ("nccl", "10"),
        ("tcp", "01"),
        ("tcp", "00"),
        ("ipc_direct", "01"),
        ("ipc_direct", "00"),
    ],
)
def test_half_of_the_heads(transport: str, devices: str) -> None:
    sending, receiving = Shape("sender", 4, 8, 128), Shape("receiver", 4, 4, 128, first_head=4)
    window = receiving.make_window(100 << 20, torch.device(f"cuda:{devices[1]}"), transport)
    carrier = make_carrier(window, transport)
    with running_sender(sending, transport, f"cuda:{devices[0]}", 200 << 20) as sender:
        for num_blocks in (1, window.num_blocks):
            fetch(carrier, window, sender.endpoint, num_blocks, is_checked=True)
    carrier.shutdown()


@pytest.mark.parametrize(("transport", "first_kill_s"), [("ipc", 0.002), ("nccl", 0.002), ("ipc_direct", 0.0005)])
def test_the_sender_is_killed_during_a_read(transport: str, first_kill_s: float) -> None:
    """The sender is killed during the transfer of a gigabyte, a little later each time, until a kill was early enough.
    The receiver's GPU still works."""
    shape, size = SHAPES["llama-8b"], 1 << 30
    window = shape.make_window(size, torch.device("cuda:1"), transport)
    carrier = make_carrier(window, transport)
    failures = num_rounds = 0
    while num_rounds < 4 or (not failures and num_rounds < 16):
        with running_sender(shape, transport, "cuda:0", size) as sender:
            fetch(carrier, window, sender.endpoint, window.num_blocks, is_checked=True)
            killer = threading.Timer(first_kill_s * (num_rounds % 4 + 1), sender.process.kill)
            killer.start()
            began_s = time.monotonic()
            try:
                fetch(carrier, window, sender.endpoint, window.num_blocks, is_checked=True)
            except TransferFailed:
                failures += 1
            print(f"\n{transport}: over after {time.monotonic() - began_s:.3f} s, {failures} failures so far")
            assert time.monotonic() - began_s < 30.0, "a fetch's own deadline is twice as long"
            killer.join()
        num_rounds += 1
    carrier.shutdown()
    assert failures > 0
