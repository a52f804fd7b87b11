"""Faults of a transfer cost time, never a token, a block or a hang; each is counted by its kind."""

from __future__ import annotations

import contextlib
import random
import socket
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgpack
import pytest

from tensorweave.cluster.errors import TransferFailed
from tensorweave.cluster.protocol import PROTOCOL_VERSION, GenerateRequest, KvEndpoint, KvSource, SamplingSpec, Ticket
from tensorweave.workers.fake_engine import hash_token
from tensorweave.workers.transfer.carrier import Carrier
from tensorweave.workers.transfer.faulty import FAULTS, Fault, FaultyCarrier
from tensorweave.workers.transfer.loop import Exchange
from tensorweave.workers.transfer.stream import Stream
from tests.workers.transfer_drive import (
    WAIT_S,
    Client,
    Gang,
    MakeCarrier,
    hash_gang,
    loop_carriers,
    request_pair,
    run_disaggregated,
    tcp_carriers,
)

KIND_OF_FAULT = {
    "flip": "digest",
    "stale": "stale",
    "late": "late",
    "truncate": "truncated",
    "duplicate": "duplicate",
    "drop": "missing",
    "delay": "timeout",
    "die": "peer_lost",
}


def faulty(make: MakeCarrier, made: list[FaultyCarrier], **plan: Any) -> MakeCarrier:
    def make_one(window: Any, alike: dict[str, str]) -> Carrier:
        carrier = FaultyCarrier(make(window, alike), seed=len(made), **plan)
        made.append(carrier)
        return carrier

    return make_one


def oracle(prompt: Sequence[int], num_tokens: int, vocab_size: int = 1000) -> list[int]:
    tokens = list(prompt)
    for _ in range(num_tokens):
        tokens.append(hash_token(tokens, vocab_size))
    return tokens[len(prompt) :]


def run_faults(
    make: MakeCarrier, sizes: tuple[int, int], faults: Sequence[Fault], at_least: int, seed: int, whole: bool
) -> tuple[dict[str, int], dict[str, int]]:
    """Requests until so many faults have been injected; returns what was injected, and what was counted."""
    rng = random.Random(seed)
    made: list[FaultyCarrier] = []
    plan = {"rate": 0.6, "faults": faults}
    knobs: dict[str, Any] = {"num_blocks": 400, "timeout_s": 0.4 if "delay" in faults else 30.0}
    with (
        hash_gang(sizes[0], make, name="P", **knobs) as prefill,
        hash_gang(sizes[1], faulty(make, made, **plan), name="D", **knobs) as decode,
    ):
        num_rounds = 0
        while sum(carrier.injected.total() for carrier in made) < at_least:
            lengths = [32 * rng.randint(1, 8) if whole else rng.randint(2, 256) for _ in range(24)]
            prompts = [[rng.randrange(1000) for _ in range(length)] for length in lengths]
            samplings = [SamplingSpec(max_tokens=rng.randint(2, 6)) for _ in prompts]
            answers = run_disaggregated(prefill, decode, prompts, samplings, name=f"round{num_rounds}-")
            for prompt, sampling, answer in zip(prompts, samplings, answers, strict=True):
                assert answer.tokens == oracle(prompt, sampling.max_tokens)
            num_rounds += 1
        prefill.wait_idle()
        decode.wait_idle()
        injected: dict[str, int] = {}
        for carrier in made:
            for fault, count in carrier.injected.items():
                injected[fault] = injected.get(fault, 0) + count
        assert prefill.failures() == {}
        return injected, decode.failures()


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_counted_by_its_kind(fault: Fault) -> None:
    injected, counted = run_faults(loop_carriers(Exchange()), (1, 2), [fault], 40, seed=1, whole=True)
    assert injected.keys() == {fault}
    if fault == "delay":
        assert counted["timeout"] >= 1
        assert counted["late"] >= injected["delay"]
    elif fault == "die":
        # The first rank that fails ends the fetch on all: what the others lose meanwhile is not counted.
        assert 1 <= counted["peer_lost"] <= injected["die"]
        assert counted["truncated"] == injected["die"]
    else:
        assert counted[KIND_OF_FAULT[fault]] >= injected[fault]


@pytest.mark.parametrize("sizes", [(1, 1), (3, 2)], ids=str)
def test_all_faults_mixed_over_tcp(sizes: tuple[int, int]) -> None:
    injected, counted = run_faults(tcp_carriers, sizes, FAULTS, 150, seed=2, whole=False)
    assert injected.keys() == set(FAULTS)
    assert counted.keys() >= set(KIND_OF_FAULT.values())


@pytest.mark.slow
def test_a_thousand_faults() -> None:
    total: dict[str, int] = {}
    for seed, sizes in enumerate([(1, 1), (2, 3), (3, 2), (1, 2)]):
        injected, counted = run_faults(tcp_carriers, sizes, FAULTS, 260, seed=seed, whole=False)
        assert counted.keys() >= set(KIND_OF_FAULT.values())
        total = {fault: total.get(fault, 0) + injected[fault] for fault in injected}
    assert sum(total.values()) >= 1000
    assert min(total.values()) >= 60


# ---- a peer that goes, hangs or does not fit


def one_request(name: str, source: KvSource, length: int = 100) -> tuple[GenerateRequest, GenerateRequest]:
    prompt = [(7 * at + len(name)) % 1000 for at in range(length)]
    return request_pair(name, prompt, SamplingSpec(max_tokens=5), source)


def check_local(decode: Gang, for_decode: GenerateRequest, kind: str, within_s: float) -> None:
    """The decode gang ends it by itself, in time, and counts why."""
    start_s = time.monotonic()
    (answer,) = Client(decode).wait([for_decode.request_id])
    assert time.monotonic() - start_s < within_s
    assert answer.tokens == oracle(for_decode.prompt_token_ids, 5)
    assert decode.failures()[kind] >= 1
    assert decode.gauge("kv_transfer_recomputed_tokens_total") > 0
    decode.wait_idle(1.0)


@pytest.mark.parametrize("size", [1, 2])
def test_the_giver_dies_while_the_taker_waits(size: int) -> None:
    with hash_gang(2, name="P") as prefill, hash_gang(size, name="D") as decode:
        _, for_decode = one_request("r", prefill.source)
        decode.leader.enqueue_request(for_decode)
        wait_until(lambda: all(t.gauges()["kv_transfer_open_fetches"] for t in decode.transfers))
        for carrier in prefill.carriers:
            carrier.shutdown()
        check_local(decode, for_decode, "peer_lost", within_s=2.0)


def test_nobody_listens_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with hash_gang(name="D") as decode:
        source = KvSource("P", (KvEndpoint("127.0.0.1", port, 0, 1),), decode.fingerprint, "secret")
        _, for_decode = one_request("r", source)
        decode.leader.enqueue_request(for_decode)
        check_local(decode, for_decode, "peer_lost", within_s=2.0)


def silent_giver(listener: socket.socket) -> None:
    """Greets, and says no word more."""
    sock, _ = listener.accept()
    stream = Stream(sock, silence_s=30.0)
    stream.receive()
    stream.send("hello", PROTOCOL_VERSION, "")
    with contextlib.suppress(TransferFailed):
        while True:
            stream.receive()


def test_a_giver_that_hangs_is_lost_after_three_seconds() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener, hash_gang(name="D") as decode:
        threading.Thread(target=silent_giver, args=(listener,), daemon=True).start()
        source = KvSource("P", (KvEndpoint(*listener.getsockname(), 0, 1),), decode.fingerprint, "secret")
        _, for_decode = one_request("r", source)
        decode.leader.enqueue_request(for_decode)
        check_local(decode, for_decode, "peer_lost", within_s=4.5)


def test_gangs_that_do_not_fit_refuse_by_name(caplog: pytest.LogCaptureFixture) -> None:
    theirs = {"version": "test", "dtype": "bfloat16"}
    with (
        hash_gang(name="P", fingerprint=theirs) as prefill,
        hash_gang(2, name="D", fingerprint={**theirs, "dtype": "float32"}) as decode,
    ):
        for_prefill, for_decode = one_request("r", prefill.source)
        prefill.leader.enqueue_request(for_prefill)
        Client(prefill).wait([for_prefill.request_id])
        decode.leader.enqueue_request(for_decode)
        check_local(decode, for_decode, "refused", within_s=2.0)
        assert "dtype: 'bfloat16' where the KV is given, 'float32' where it is taken" in caplog.text
        prefill.wait_idle(1.0)


def test_a_ticket_for_another_prompt_is_refused() -> None:
    with hash_gang(name="P") as prefill, hash_gang(name="D") as decode:
        for_prefill, _ = one_request("r", prefill.source)
        _, for_decode = request_pair("r", [1, 2, 3] * 30, SamplingSpec(max_tokens=5), prefill.source)
        prefill.leader.enqueue_request(for_prefill)
        decode.leader.enqueue_request(for_decode)
        Client(prefill).wait([for_prefill.request_id])
        check_local(decode, for_decode, "refused", within_s=2.0)
        prefill.wait_idle(1.0)


def test_a_wrong_secret_opens_nothing() -> None:
    with hash_gang(name="P") as prefill, hash_gang(name="D") as decode:
        source = KvSource("P", prefill.source.endpoints, prefill.fingerprint, "guessed")
        _, for_decode = one_request("r", source)
        decode.leader.enqueue_request(for_decode)
        check_local(decode, for_decode, "peer_lost", within_s=2.0)


@pytest.mark.parametrize(
    "noise",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 400,
        (5000).to_bytes(4, "little") + bytes(5004),
        (8).to_bytes(4, "little") + bytes(4) + msgpack.packb(["hi", "you"]),
        b"",
    ],
    ids=["http", "too long", "no hello", "nothing"],
)
def test_noise_on_an_endpoint_harms_nobody(noise: bytes) -> None:
    with hash_gang(name="P") as prefill, hash_gang(name="D") as decode:
        endpoint = prefill.source.endpoints[0]
        with socket.create_connection((endpoint.host, endpoint.port), timeout=5.0) as sock:
            sock.sendall(noise)
            if noise:
                assert sock.recv(1) == b""
            (answer,) = run_disaggregated(prefill, decode, [[3] * 100], [SamplingSpec(max_tokens=3)])
        assert answer.tokens == oracle([3] * 100, 3)
        assert decode.failures() == {}


# ---- leases, and cancels in every phase


def wait_until(is_so: Any, timeout_s: float = 5.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    tick = threading.Event()
    while not is_so():
        assert time.monotonic() < deadline_s
        tick.wait(0.005)


def test_a_lease_ends_by_time_and_who_comes_later_computes() -> None:
    lease_s = 3.0  # the assertion below must come before its end, also on a busy machine
    with hash_gang(2, name="P", lease_s=lease_s) as prefill, hash_gang(name="D") as decode:
        for_prefill, for_decode = one_request("r", prefill.source)
        prefill.leader.enqueue_request(for_prefill)
        Client(prefill).wait([for_prefill.request_id])
        assert all(kv_cache.used for kv_cache in prefill.kv_caches)
        prefill.wait_idle(lease_s + 3.0)
        decode.leader.enqueue_request(for_decode)
        check_local(decode, for_decode, "gone", within_s=2.0)


def test_a_lease_can_be_given_up() -> None:
    with hash_gang(2, name="P") as prefill:
        for_prefill, _ = one_request("r", prefill.source)
        prefill.leader.enqueue_request(for_prefill)
        Client(prefill).wait([for_prefill.request_id])
        assert prefill.leader.cancel_request(for_prefill.request_id)
        prefill.wait_idle(1.0)
        assert not prefill.leader.cancel_request(for_prefill.request_id)


def test_a_prefill_that_was_refused_keeps_nobody_waiting() -> None:
    with hash_gang(name="P", max_seq_len=64) as prefill, hash_gang(2, name="D") as decode:
        for_prefill, for_decode = one_request("r", prefill.source)
        decode.leader.enqueue_request(for_decode)
        with pytest.raises(ValueError, match="max_seq_len"):
            prefill.leader.enqueue_request(for_prefill)
        check_local(decode, for_decode, "gone", within_s=2.5)


def test_a_ticket_that_is_not_needed_is_given_back() -> None:
    """The decode gang has the prompt in its own tree, or it has one token alone."""
    with hash_gang(name="P") as prefill, hash_gang(2, name="D") as decode:
        prompts = [[4] * 65, [4] * 65, [9]]
        for prompt in prompts:
            (answer,) = run_disaggregated(prefill, decode, [prompt], [SamplingSpec(max_tokens=3)], name=f"{prompt}")
            assert answer.tokens == oracle(prompt, 3)
        prefill.wait_idle(1.0)


@pytest.mark.parametrize("phase", ["queued", "prefill", "hand-off", "transfer", "decode"])
def test_cancels_free_everything_on_both_sides_within_a_second(phase: str) -> None:
    """Twenty requests at a time; the decode gang's request is cancelled, and the prefill gang's by its own id."""
    held: list[FaultyCarrier] = []
    carriers = faulty(tcp_carriers, held, rate=1.0 if phase == "transfer" else 0.0, faults=["delay"])
    knobs: dict[str, Any] = {
        "num_blocks": 256,
        "max_seq_len": 8192,
        "max_num_tokens": 64 if phase == "prefill" else 512,
    }
    with hash_gang(2, name="P", **knobs) as prefill, hash_gang(2, carriers, name="D", **knobs) as decode:
        client = Client(prefill, decode)
        pairs = []
        for i in range(20):
            prompt = [(i * 31 + at) % 1000 for at in range(300)]
            sampling = SamplingSpec(max_tokens=4000 if phase == "decode" else 5)
            pairs.append(request_pair(f"r{i}", prompt, sampling, prefill.source))
        for for_prefill, for_decode in pairs:
            if phase != "queued":
                prefill.leader.enqueue_request(for_prefill)
            if phase not in ("hand-off",):
                decode.leader.enqueue_request(for_decode)
        reach(phase, client, prefill, decode, pairs)
        start_s = time.monotonic()
        for for_prefill, for_decode in pairs:
            decode.leader.cancel_request(for_decode.request_id)
            prefill.leader.cancel_request(for_prefill.request_id)
        prefill.wait_idle(1.0)
        decode.wait_idle(1.0)
        assert time.monotonic() - start_s < 1.0


def reach(phase: str, client: Client, prefill: Gang, decode: Gang, pairs: Any) -> None:
    """Wait until requests stand in this phase."""
    if phase == "queued":
        wait_until(lambda: decode.leader.num_requests == len(pairs))
    elif phase == "prefill":
        wait_until(lambda: prefill.kv_caches[0].used > 4)
    elif phase in ("hand-off", "transfer"):
        client.wait([for_prefill.request_id for for_prefill, _ in pairs])
        assert prefill.gauge("kv_transfer_open_leases") == 2 * len(pairs)
        if phase == "transfer":
            wait_until(lambda: decode.gauge("kv_transfer_open_fetches") > 0)
    else:
        wait_until(lambda: decode.kv_caches[0].used > 20 and not decode.gauge("kv_transfer_open_fetches"))


def test_a_ticket_used_twice_finds_nothing_the_second_time() -> None:
    with hash_gang(name="P") as prefill, hash_gang(name="D") as decode, hash_gang(name="E") as other:
        run_disaggregated(prefill, decode, [[6] * 90], [SamplingSpec(max_tokens=2)])
        prefill.wait_idle(1.0)
        ticket = Ticket("ticket-r0", prefill.source)
        request = GenerateRequest("again", [6] * 90, SamplingSpec(max_tokens=5), fetch=ticket)
        other.leader.enqueue_request(request)
        check_local(other, request, "gone", within_s=2.0)


def test_a_gang_waits_for_the_holders_of_its_tickets() -> None:
    with hash_gang(name="P", lease_s=60.0) as prefill:
        assert prefill.leader.wait_released(0.0)
        for_prefill, _ = one_request("held", prefill.source)
        prefill.leader.enqueue_request(for_prefill)
        Client(prefill).wait([for_prefill.request_id])
        assert not prefill.leader.wait_released(0.05)
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(prefill.leader.wait_released, WAIT_S)
            prefill.leader.cancel_request(for_prefill.request_id)
            assert waiting.result(WAIT_S)
        prefill.wait_idle()
