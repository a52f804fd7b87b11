"""Faults of a transfer cost time, never a token, a block or a hang; each is counted by its kind."""

from __future__ import annotations

import contextlib
import random
import socket
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import msgpack
import pytest

from tensorweave.cluster.errors import TransferFailed
from tensorweave.cluster.protocol import PROTOCOL_VERSION, GenerateRequest, KvEndpoint, KvSource, SamplingSpec, Ticket
from tensorweave.workers.fakes.fake_engine import hash_token
from tensorweave.workers.transfer.carrier import Carrier
from tensorweave.workers.transfer.carriers import tcp_client
from tensorweave.workers.transfer.carriers.faulty import FAULTS, Fault, FaultyCarrier
from tensorweave.workers.transfer.carriers.loop import Exchange
from tensorweave.workers.transfer.transfers import TICK_S
from tensorweave.workers.transfer.transports.frame_connection import SILENCE_S, Stream
from tensorweave.workers.transfer.transports.transport import HostTransport
from tests.workers.stepped_engine import SteppedEngine
from tests.workers.transfer_drive import (
    Client,
    Gang,
    MakeCarrier,
    hash_gang,
    loop_carriers,
    request_pair,
    run_disaggregated,
    stepped_gang,
    tcp_carriers,
)
from tests.workers.waiting import WAIT_S, is_hung_up_after, wait_until

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
    knobs: dict[str, Any] = {"num_blocks": 400, **({"timeout_s": 0.5} if "delay" in faults else {})}
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
@pytest.mark.parametrize("size", [1, 2])
def test_each_fault_is_counted_by_its_kind(fault: Fault, size: int) -> None:
    injected, counted = run_faults(loop_carriers(Exchange()), (1, size), [fault], 40, seed=1, whole=True)
    assert injected.keys() == {fault}
    if fault == "delay":
        assert counted["timeout"] >= 1
        assert counted["late"] >= injected["delay"]
    elif fault == "late":
        # What has been asked for again and has come by then is there twice.
        assert counted["late"] >= 1
        assert counted["late"] + counted.get("duplicate", 0) >= injected["late"]
    elif fault == "die":
        # The first rank that fails ends the fetch on all: what the others lose meanwhile is not counted.
        assert 1 <= counted["peer_lost"] <= injected["die"]
        assert counted["truncated"] == injected["die"]
    else:
        # The same holds for what was on its way to the other rank then: it is late, or nobody waits for it any more.
        assert counted[KIND_OF_FAULT[fault]] >= (injected[fault] if size == 1 else 1)


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


def check_local(decode: Gang, for_decode: GenerateRequest, kind: str, within_s: float = WAIT_S) -> None:
    """The decode gang ends it by itself, not by the fetch's own deadline, and counts why."""
    (answer,) = Client(decode).wait([for_decode.request_id], within_s)
    assert "timeout" not in decode.failures()
    assert answer.tokens == oracle(for_decode.prompt_token_ids, 5)
    assert decode.failures()[kind] >= 1
    assert decode.gauge("kv_transfer_recomputed_tokens_total") > 0
    decode.wait_idle()


@pytest.mark.parametrize("size", [1, 2])
def test_the_giver_dies_while_the_taker_waits(size: int) -> None:
    with hash_gang(2, name="P") as prefill, hash_gang(size, name="D") as decode:
        _, for_decode = one_request("r", prefill.source)
        decode.leader.enqueue_request(for_decode)
        wait_until(lambda: all(t.gauges()["kv_transfer_open_fetches"] for t in decode.transfers))
        for carrier in prefill.carriers:
            carrier.shutdown()
        check_local(decode, for_decode, "peer_lost")


def test_nobody_listens_there() -> None:
    with socket.socket() as bound, hash_gang(name="D") as decode:
        bound.bind(("127.0.0.1", 0))  # and does not listen: nobody else will meanwhile
        source = KvSource("P", (KvEndpoint(*bound.getsockname(), 0, 1),), decode.fingerprint, "secret")
        _, for_decode = one_request("r", source)
        decode.leader.enqueue_request(for_decode)
        check_local(decode, for_decode, "peer_lost")


def silent_giver(listener: socket.socket) -> None:
    """Greets, and says no word more."""
    sock, _ = listener.accept()
    stream = Stream(sock, silence_s=WAIT_S)
    stream.receive()
    stream.trust(0)
    stream.send("hello", PROTOCOL_VERSION, "", {HostTransport.name: {}})
    with contextlib.suppress(TransferFailed):
        while True:
            stream.receive()


def test_a_giver_that_hangs_is_lost_after_three_seconds(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tcp_client, "Stream", Stream)
    with socket.create_server(("127.0.0.1", 0)) as listener, hash_gang(name="D") as decode:
        threading.Thread(target=silent_giver, args=(listener,), daemon=True).start()
        source = KvSource("P", (KvEndpoint(*listener.getsockname(), 0, 1),), decode.fingerprint, "secret")
        _, for_decode = one_request("r", source)
        start_s = time.monotonic()
        decode.leader.enqueue_request(for_decode)
        # Whenever this process is stopped, a wait for the peer begins anew.
        check_local(decode, for_decode, "peer_lost", within_s=3 * WAIT_S)
        assert time.monotonic() - start_s > SILENCE_S - 0.1
        assert "the peer is silent" in caplog.text


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
        check_local(decode, for_decode, "refused")
        assert "dtype: 'bfloat16' where the KV is given, 'float32' where it is taken" in caplog.text
        prefill.wait_idle()


def test_a_ticket_for_another_prompt_is_refused() -> None:
    with hash_gang(name="P") as prefill, hash_gang(name="D") as decode:
        for_prefill, _ = one_request("r", prefill.source)
        _, for_decode = request_pair("r", [1, 2, 3] * 30, SamplingSpec(max_tokens=5), prefill.source)
        prefill.leader.enqueue_request(for_prefill)
        decode.leader.enqueue_request(for_decode)
        Client(prefill).wait([for_prefill.request_id])
        check_local(decode, for_decode, "refused")
        prefill.wait_idle()


def test_a_wrong_secret_opens_nothing() -> None:
    with hash_gang(name="P") as prefill, hash_gang(name="D") as decode:
        source = KvSource("P", prefill.source.endpoints, prefill.fingerprint, "guessed")
        _, for_decode = one_request("r", source)
        decode.leader.enqueue_request(for_decode)
        check_local(decode, for_decode, "peer_lost")


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
        with socket.create_connection((endpoint.host, endpoint.port), timeout=WAIT_S):
            if noise:
                assert is_hung_up_after(noise, (endpoint.host, endpoint.port))
            (answer,) = run_disaggregated(prefill, decode, [[3] * 100], [SamplingSpec(max_tokens=3)])
        assert answer.tokens == oracle([3] * 100, 3)
        assert decode.failures() == {}


# ---- leases, and cancels in every phase


def test_a_lease_ends_by_time_and_who_comes_later_computes() -> None:
    now_s = [100.0]
    clock: dict[str, Any] = {"lease_s": 3.0, "clock": lambda: now_s[0]}
    with hash_gang(2, name="P", **clock) as prefill, hash_gang(name="D") as decode:
        for_prefill, for_decode = one_request("r", prefill.source)
        prefill.leader.enqueue_request(for_prefill)
        Client(prefill).wait([for_prefill.request_id])
        wait_until(lambda: prefill.gauge("kv_transfer_open_leases") == 2)
        now_s[0] += 2.9
        time.sleep(3 * TICK_S)
        assert all(kv_cache.used for kv_cache in prefill.kv_caches)
        now_s[0] += 0.2
        prefill.wait_idle()
        decode.leader.enqueue_request(for_decode)
        check_local(decode, for_decode, "gone")


def test_a_lease_can_be_given_up() -> None:
    with hash_gang(2, name="P") as prefill:
        for_prefill, _ = one_request("r", prefill.source)
        prefill.leader.enqueue_request(for_prefill)
        Client(prefill).wait([for_prefill.request_id])
        assert prefill.leader.cancel_request(for_prefill.request_id)
        prefill.wait_idle()
        assert not prefill.leader.cancel_request(for_prefill.request_id)


def test_a_prefill_that_was_refused_keeps_nobody_waiting() -> None:
    with hash_gang(name="P", max_seq_len=64) as prefill, hash_gang(2, name="D") as decode:
        for_prefill, for_decode = one_request("r", prefill.source)
        decode.leader.enqueue_request(for_decode)
        with pytest.raises(ValueError, match="maximum context length is 64"):
            prefill.leader.enqueue_request(for_prefill)
        check_local(decode, for_decode, "gone")


def test_a_ticket_that_is_not_needed_is_given_back() -> None:
    """The decode gang has the prompt in its own tree, or it has one token alone."""
    with hash_gang(name="P") as prefill, hash_gang(2, name="D") as decode:
        prompts = [[4] * 65, [4] * 65, [9]]
        for i, prompt in enumerate(prompts):
            (answer,) = run_disaggregated(prefill, decode, [prompt], [SamplingSpec(max_tokens=3)], name=f"r{i}-")
            assert answer.tokens == oracle(prompt, 3)
        prefill.wait_idle()


@pytest.mark.parametrize("phase", ["queued", "prefill", "hand-off", "transfer", "decode"])
def test_cancels_free_everything_on_both_sides_within_a_second(phase: str) -> None:
    """Twenty requests at a time; the decode gang's request is cancelled, and the prefill gang's by its own id. Only the
    quickest round counts: in the others this machine may have stood still."""
    took_s: list[float] = []
    while len(took_s) < 8 and min(took_s, default=1.0) >= 1.0:
        took_s.append(cancel_in(phase))
    assert min(took_s) < 1.0


def cancel_in(phase: str) -> float:
    """Seconds until all is free."""
    carriers = faulty(tcp_carriers, [], rate=1.0 if phase == "transfer" else 0.0, faults=["delay"])
    knobs: dict[str, Any] = {
        "num_blocks": 256,
        "max_seq_len": 8192,
        "max_num_tokens": 64 if phase == "prefill" else 512,
    }
    prefill, there = stepped_gang(2, name="P", **knobs)
    decode, here = stepped_gang(2, carriers, name="D", **knobs)
    with prefill, decode:
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
        reach(phase, client, prefill, there, decode, here, pairs)
        start_s = time.monotonic()
        for for_prefill, for_decode in pairs:
            decode.leader.cancel_request(for_decode.request_id)
            prefill.leader.cancel_request(for_prefill.request_id)
        run_free(*there, *here)
        prefill.wait_idle()
        decode.wait_idle()
        return time.monotonic() - start_s


def run_free(*engines: SteppedEngine) -> None:
    for engine in engines:
        engine.run_free()


def reach(
    phase: str,
    client: Client,
    prefill: Gang,
    there: list[SteppedEngine],
    decode: Gang,
    here: list[SteppedEngine],
    pairs: Any,
) -> None:
    """Wait until requests stand in this phase; their engines keep them there."""
    if phase == "queued":
        wait_until(lambda: decode.leader.num_requests == len(pairs))
    elif phase == "prefill":
        for engine in there:
            engine.allow(3)
        wait_until(lambda: all(kv_cache.used > 4 for kv_cache in prefill.kv_caches))
    elif phase in ("hand-off", "transfer"):
        run_free(*there)
        client.wait([for_prefill.request_id for for_prefill, _ in pairs])
        wait_until(lambda: prefill.gauge("kv_transfer_open_leases") == 2 * len(pairs))
        if phase == "transfer":
            wait_until(lambda: decode.gauge("kv_transfer_open_fetches") > 0)
    else:
        run_free(*there)
        for engine in here:
            engine.allow(400)
        wait_until(lambda: decode.kv_caches[0].used > 20 and not decode.gauge("kv_transfer_open_fetches"))


def test_a_ticket_used_twice_finds_nothing_the_second_time() -> None:
    with hash_gang(name="P") as prefill, hash_gang(name="D") as decode, hash_gang(name="E") as other:
        run_disaggregated(prefill, decode, [[6] * 90], [SamplingSpec(max_tokens=2)])
        prefill.wait_idle()
        ticket = Ticket("ticket-r0", prefill.source)
        request = GenerateRequest("again", [6] * 90, SamplingSpec(max_tokens=5), fetch=ticket)
        other.leader.enqueue_request(request)
        check_local(other, request, "gone")


def test_an_id_used_again_gets_no_second_lease_and_the_first_is_not_lost() -> None:
    """A client may ask under the same name while the lease of its last request is open."""
    with hash_gang(name="P") as prefill, hash_gang(name="D") as decode:
        first, take_first = one_request("same", prefill.source)
        again = replace(first, offer="another-ticket")
        for request in (first, again):
            prefill.leader.enqueue_request(request)
            Client(prefill).wait([request.request_id])
        take_again = replace(take_first, request_id="again", fetch=Ticket("another-ticket", prefill.source))
        decode.leader.enqueue_request(take_again)
        check_local(decode, take_again, "gone")
        prefill.leader.cancel_request(first.request_id)
        prefill.wait_idle()


def test_a_gang_waits_for_the_holders_of_its_tickets() -> None:
    with hash_gang(name="P") as prefill:
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
