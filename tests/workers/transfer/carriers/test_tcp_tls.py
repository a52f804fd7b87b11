"""KV over TLS: the same answers, and peers without the cluster's certificates get nothing."""

from __future__ import annotations

import contextlib
import random
import socket
import ssl
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tensorweave.cluster.tls import TlsFiles
from tensorweave.workers.transfer.carrier import Carrier
from tensorweave.workers.transfer.carriers.tcp import TcpCarrier
from tensorweave.workers.transfer.transports.peer_sockets import PeerSockets, PlainPeers, TlsPeers, TlsSocket
from tensorweave.workers.transfer.window import PoolWindow
from tests.certificates import make_files
from tests.workers.transfer.carriers.test_tcp import run_over
from tests.workers.transfer.expected import check_computed_locally, one_request
from tests.workers.transfer_drive import SECRET, MakeCarrier, hash_gang
from tests.workers.waiting import WAIT_S

NUM_BYTES = 3_000_001


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> TlsFiles:
    return make_files(tmp_path_factory.mktemp("tls"))


def over(peers: PeerSockets) -> MakeCarrier:
    def make(window: PoolWindow, fingerprint: dict[str, str]) -> Carrier:
        return TcpCarrier(window, fingerprint, "127.0.0.1", SECRET, peers=peers)

    return make


def test_kv_moves_over_tls(files: TlsFiles) -> None:
    gauges = run_over(over(TlsPeers(files)), over(TlsPeers(files)))
    assert gauges["kv_transfer_blocks_total"] > 0
    assert gauges["kv_transfer_recomputed_tokens_total"] == 0


def check_refused(theirs: PeerSockets, ours: PeerSockets, caplog: pytest.LogCaptureFixture, *reasons: str) -> None:
    """The receiver computes the prompt itself, and its log has one of the reasons."""
    caplog.set_level("INFO")
    with hash_gang(1, over(theirs), name="P") as prefill, hash_gang(1, over(ours), name="D") as decode:
        _, for_decode = one_request("r", prefill.source)
        decode.leader.enqueue_request(for_decode)
        check_computed_locally(decode, for_decode, "peer_lost", within_s=2 * WAIT_S)
    assert any(reason in caplog.text for reason in reasons), caplog.text


def test_a_sender_of_another_authority_is_refused(
    files: TlsFiles, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    check_refused(TlsPeers(make_files(tmp_path)), TlsPeers(files), caplog, "the peer's certificate is refused: ")


def test_a_receiver_of_another_authority_is_refused(
    files: TlsFiles, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stranger = TlsPeers(replace(make_files(tmp_path), authority=files.authority))
    check_refused(TlsPeers(files), stranger, caplog, "alert unknown ca", "the peer's certificate is refused: ")


def test_a_receiver_without_tls_is_refused(files: TlsFiles, caplog: pytest.LogCaptureFixture) -> None:
    check_refused(TlsPeers(files), PlainPeers(), caplog, "TLS: wrong version number", "TLS: record layer failure")


def test_a_sender_without_tls_is_refused(files: TlsFiles, caplog: pytest.LogCaptureFixture) -> None:
    check_refused(PlainPeers(), TlsPeers(files), caplog, "is over the limit")


# ---- the socket


@pytest.fixture
def pair(files: TlsFiles) -> Iterator[tuple[TlsSocket, TlsSocket]]:
    one, two = socket.socketpair()
    with one, two:
        peers = TlsPeers(files)
        server, client = peers.accepted(one), peers.connected(two)
        assert isinstance(server, TlsSocket)
        assert isinstance(client, TlsSocket)
        yield server, client


def send_all(sock: TlsSocket, data: bytes) -> None:
    view, sizes = memoryview(data), random.Random(0)
    while len(view):
        pieces, start = [], 0
        for _ in range(sizes.randrange(1, 5)):
            size = sizes.randrange(0, 200_000)
            pieces.append(view[start : start + size])
            start += size
        view = view[sock.sendmsg(pieces) :]


def receive(sock: TlsSocket, num_bytes: int) -> bytes:
    data = bytearray(num_bytes)
    view = memoryview(data)
    while len(view):
        count = sock.recv_into(view, 0, 0)
        assert count
        view = view[count:]
    return bytes(data)


def test_both_ends_send_and_receive_at_once(pair: tuple[TlsSocket, TlsSocket]) -> None:
    """On four threads, more than the sockets' buffers hold."""
    data = [random.Random(seed).randbytes(NUM_BYTES) for seed in (1, 2)]
    senders = [threading.Thread(target=send_all, args=arguments) for arguments in zip(pair, data, strict=True)]
    received: dict[int, bytes] = {}

    def read(number: int) -> None:
        received[number] = receive(pair[1 - number], NUM_BYTES)

    readers = [threading.Thread(target=read, args=(number,)) for number in (0, 1)]
    for thread in (*senders, *readers):
        thread.start()
    for thread in (*senders, *readers):
        thread.join(WAIT_S)
        assert not thread.is_alive()
    assert [received[number] for number in (0, 1)] == data


def test_a_wait_that_times_out_loses_nothing(files: TlsFiles) -> None:
    """Neither in the handshake nor later."""
    one, two = socket.socketpair()
    with one, two:
        one.setblocking(False)
        two.setblocking(False)
        peers = TlsPeers(files)
        server, client = peers.accepted(one), peers.connected(two)
        view = memoryview(bytearray(NUM_BYTES))
        data = random.Random(3).randbytes(NUM_BYTES)
        num_sent = num_received = 0
        while num_received < NUM_BYTES:
            with contextlib.suppress(BlockingIOError):
                num_sent += client.sendmsg([memoryview(data)[num_sent:]])
            with contextlib.suppress(BlockingIOError):
                num_received += server.recv_into(view[num_received:], 0, 0)
        assert view == data


def test_files_that_are_missing_or_wrong_are_named(files: TlsFiles, tmp_path: Path) -> None:
    other = make_files(tmp_path)
    with pytest.raises(ValueError, match=r"network\.tls\.key cannot be read: /nowhere: No such file"):
        TlsPeers(replace(files, key="/nowhere"))
    with pytest.raises(ValueError, match=r"network\.tls\.certificate and key are no PEM files that match"):
        TlsPeers(replace(files, key=other.key))
    with pytest.raises(ValueError, match=r"network\.tls\.authority is no PEM file of certificates"):
        TlsPeers(replace(files, authority=files.key))


def test_tls_1_2_is_refused(files: TlsFiles) -> None:
    one, two = socket.socketpair()
    old = files.connecting()
    old.minimum_version, old.maximum_version = ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_2
    with one, two:
        server, client = TlsPeers(files).accepted(one), TlsSocket(two, old, is_server=False)
        asking = threading.Thread(target=_ask, args=(client,))
        asking.start()
        with pytest.raises(OSError, match="TLS: unsupported protocol"):
            server.recv_into(memoryview(bytearray(1)), 0, 0)
        asking.join(WAIT_S)


def _ask(sock: TlsSocket) -> None:
    with contextlib.suppress(OSError):
        sock.sendmsg([memoryview(b"hello")])
