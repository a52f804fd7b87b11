"""`TcpCarrier`: the choice of a transport, peers that are lost or silent, and bytes that break the protocol."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Sequence

import msgpack
import pytest

from tensorweave.cluster.errors import TransferFailed
from tensorweave.cluster.protocol import PROTOCOL_VERSION, KvEndpoint, KvSource, SamplingSpec
from tensorweave.workers.transfer.carrier import Carrier
from tensorweave.workers.transfer.carriers import tcp_client
from tensorweave.workers.transfer.carriers.tcp import TcpCarrier
from tensorweave.workers.transfer.transports.direct import DirectTransport
from tensorweave.workers.transfer.transports.frame_connection import SILENCE_S, FrameConnection
from tensorweave.workers.transfer.transports.host import HostTransport
from tensorweave.workers.transfer.transports.transport import Transport
from tensorweave.workers.transfer.window import PoolWindow
from tests.workers.engine_drive import random_prompts
from tests.workers.transfer.expected import check_computed_locally, expected_tokens, one_request
from tests.workers.transfer_drive import (
    DEADLINE_S,
    SECRET,
    Client,
    MakeCarrier,
    SharedPools,
    hash_gang,
    request_pair,
    run_aggregated,
    run_disaggregated,
)
from tests.workers.waiting import WAIT_S, is_hung_up_after, wait_until

PROMPTS = random_prompts(8, 90, vocab=500)
SAMPLINGS = [SamplingSpec(max_tokens=5) for _ in PROMPTS]


def carriers(pools: SharedPools, *names: str, process: int = 1) -> MakeCarrier:
    def make(window: PoolWindow, fingerprint: dict[str, str]) -> Carrier:
        transports: dict[str, Transport] = {
            "ipc_direct": DirectTransport(window, 1 << 12, pools.of_process(process)),
            "tcp": HostTransport(window),
        }
        return TcpCarrier(window, fingerprint, "127.0.0.1", SECRET, [transports[name] for name in names])

    return make


def run_over(theirs: MakeCarrier, ours: MakeCarrier, lease_s: float = DEADLINE_S) -> dict[str, float]:
    """The decode gang's gauges, after answers that are right."""
    with (
        hash_gang(1, theirs, lease_s=lease_s) as prefill,
        hash_gang(1, ours) as decode,
        hash_gang(1, None) as alone,
    ):
        want = [answer.tokens for answer in run_aggregated(alone, PROMPTS, SAMPLINGS)]
        assert [answer.tokens for answer in run_disaggregated(prefill, decode, PROMPTS, SAMPLINGS)] == want
        prefill.wait_idle()
        decode.wait_idle()
        return decode.leader.gauges()


@pytest.mark.parametrize("theirs", [("ipc_direct", "tcp"), ("tcp", "ipc_direct"), ("ipc_direct",)])
def test_the_receiver_picks_its_first_transport(theirs: Sequence[str]) -> None:
    pools = SharedPools()
    gauges = run_over(carriers(pools, *theirs), carriers(pools, "ipc_direct", "tcp"))
    assert pools.num_mapped > 0
    assert gauges["kv_transfer_blocks_total"] > 0
    assert gauges["kv_transfer_recomputed_tokens_total"] == 0


def test_a_transport_that_does_not_reach_the_sender_is_skipped() -> None:
    pools = SharedPools()
    gauges = run_over(carriers(pools, "ipc_direct", "tcp", process=1), carriers(pools, "ipc_direct", "tcp", process=2))
    assert pools.num_mapped == 0
    assert gauges["kv_transfer_blocks_total"] > 0


def test_without_a_common_transport_the_prompt_is_computed() -> None:
    pools = SharedPools()
    gauges = run_over(carriers(pools, "tcp"), carriers(pools, "ipc_direct"), lease_s=0.5)
    assert gauges["kv_transfer_blocks_total"] == 0
    assert gauges["kv_transfer_failures_no_transport_total"] == len(PROMPTS)
    assert gauges["kv_transfer_failures_peer_lost_total"] == 0


# ---- a peer that is lost, silent, or does not fit


@pytest.mark.parametrize("size", [1, 2])
def test_the_sender_dies_while_the_receiver_waits(size: int) -> None:
    with hash_gang(2, name="P") as prefill, hash_gang(size, name="D") as decode:
        _, for_decode = one_request("r", prefill.source)
        decode.leader.enqueue_request(for_decode)
        wait_until(lambda: all(t.gauges()["kv_transfer_open_fetches"] for t in decode.transfers))
        for carrier in prefill.carriers:
            carrier.shutdown()
        check_computed_locally(decode, for_decode, "peer_lost")


def test_no_sender_listens_at_the_address() -> None:
    with socket.socket() as bound, hash_gang(name="D") as decode:
        bound.bind(("127.0.0.1", 0))  # and does not listen: nobody else will meanwhile
        source = KvSource("P", (KvEndpoint(*bound.getsockname(), 0, 1),), decode.fingerprint, "secret")
        _, for_decode = one_request("r", source)
        decode.leader.enqueue_request(for_decode)
        check_computed_locally(decode, for_decode, "peer_lost")


def silent_sender(listener: socket.socket) -> None:
    """Sends its handshake, and nothing more."""
    sock, _ = listener.accept()
    connection = FrameConnection(sock, silence_s=WAIT_S)
    connection.receive()
    connection.accept_bodies(0)
    connection.send("hello", PROTOCOL_VERSION, "", {HostTransport.name: {}})
    with contextlib.suppress(TransferFailed):
        while True:
            connection.receive()


def test_a_hung_sender_is_lost_after_three_seconds(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tcp_client, "FrameConnection", FrameConnection)
    with socket.create_server(("127.0.0.1", 0)) as listener, hash_gang(name="D") as decode:
        threading.Thread(target=silent_sender, args=(listener,), daemon=True).start()
        source = KvSource("P", (KvEndpoint(*listener.getsockname(), 0, 1),), decode.fingerprint, "secret")
        _, for_decode = one_request("r", source)
        start_s = time.monotonic()
        decode.leader.enqueue_request(for_decode)
        # Whenever this process is stopped, the wait for the peer starts again.
        check_computed_locally(decode, for_decode, "peer_lost", within_s=3 * WAIT_S)
        assert time.monotonic() - start_s > SILENCE_S - 0.1
        assert "the peer is silent" in caplog.text


def test_the_difference_between_gangs_is_named_in_the_refusal(caplog: pytest.LogCaptureFixture) -> None:
    theirs = {"version": "test", "dtype": "bfloat16"}
    with (
        hash_gang(name="P", fingerprint=theirs) as prefill,
        hash_gang(2, name="D", fingerprint={**theirs, "dtype": "float32"}) as decode,
    ):
        for_prefill, for_decode = one_request("r", prefill.source)
        prefill.leader.enqueue_request(for_prefill)
        Client(prefill).wait([for_prefill.request_id])
        decode.leader.enqueue_request(for_decode)
        check_computed_locally(decode, for_decode, "refused")
        assert "dtype: 'bfloat16' at the sender, 'float32' at the receiver" in caplog.text
        prefill.wait_idle()


def test_a_ticket_for_another_prompt_is_refused() -> None:
    with hash_gang(name="P") as prefill, hash_gang(name="D") as decode:
        for_prefill, _ = one_request("r", prefill.source)
        _, for_decode = request_pair("r", [1, 2, 3] * 30, SamplingSpec(max_tokens=5), prefill.source)
        prefill.leader.enqueue_request(for_prefill)
        decode.leader.enqueue_request(for_decode)
        Client(prefill).wait([for_prefill.request_id])
        check_computed_locally(decode, for_decode, "refused")
        prefill.wait_idle()


def test_a_wrong_secret_is_refused() -> None:
    with hash_gang(name="P") as prefill, hash_gang(name="D") as decode:
        source = KvSource("P", prefill.source.endpoints, prefill.fingerprint, "guessed")
        _, for_decode = one_request("r", source)
        decode.leader.enqueue_request(for_decode)
        check_computed_locally(decode, for_decode, "peer_lost")


@pytest.mark.parametrize(
    "garbage",
    [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 400,
        (5000).to_bytes(4, "little") + bytes(5004),
        (8).to_bytes(4, "little") + bytes(4) + msgpack.packb(["hi", "you"]),
        b"",
    ],
    ids=["http", "too long", "no hello", "nothing"],
)
def test_garbage_on_an_endpoint_does_not_affect_other_peers(garbage: bytes) -> None:
    with hash_gang(name="P") as prefill, hash_gang(name="D") as decode:
        endpoint = prefill.source.endpoints[0]
        with socket.create_connection((endpoint.host, endpoint.port), timeout=WAIT_S):
            if garbage:
                assert is_hung_up_after(garbage, (endpoint.host, endpoint.port))
            (answer,) = run_disaggregated(prefill, decode, [[3] * 100], [SamplingSpec(max_tokens=3)])
        assert answer.tokens == expected_tokens([3] * 100, 3)
        assert decode.failures() == {}
