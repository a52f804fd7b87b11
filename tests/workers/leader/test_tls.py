"""A leader that has TLS: encrypted answers, and refusals of whoever does not belong to the cluster."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tensorweave.cluster import wire
from tensorweave.cluster.errors import NotReady, TensorweaveError, WireError
from tensorweave.cluster.protocol import GangAddress
from tensorweave.cluster.socket_link import SocketLink
from tensorweave.cluster.tls import TlsFiles
from tensorweave.workers.fakes.fake_executor import FakeExecutor, fake_output
from tensorweave.workers.leader.server import LeaderServer
from tests.certificates import make_files
from tests.workers.leader.links import HOST, SECRET, address_of, linked, make_request, run, tokens_of
from tests.workers.waiting import WAIT_S

pytestmark = pytest.mark.usefixtures("patient_links")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> TlsFiles:
    return make_files(tmp_path_factory.mktemp("tls"))


@pytest.fixture
def address(files: TlsFiles) -> Iterator[GangAddress]:
    executor = FakeExecutor()
    leader = LeaderServer(executor, HOST, SECRET, tls=files.accepting())
    try:
        yield replace(address_of(leader.start()), tls=files)
    finally:
        leader.stop(WAIT_S)
        executor.shutdown()


def test_answers_are_encrypted(address: GangAddress) -> None:
    """Long ones, too, on several links at once."""
    seen = bytearray()

    async def listen_in(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        theirs, ours = await asyncio.open_connection(address.host, address.port)
        await asyncio.gather(_copy(reader, ours, seen), _copy(theirs, writer, seen))

    async def body() -> None:
        tap = await asyncio.start_server(listen_in, HOST, 0)
        tapped = replace(address, port=tap.sockets[0].getsockname()[1])
        async with linked(address) as one, linked(tapped) as two:
            prompts = [[n, n + 1] * 500 for n in range(6)]
            links = [one, two] * 3
            jobs = [
                tokens_of(link, make_request(f"request-{n}", 200 + n, prompt))
                for n, (prompt, link) in enumerate(zip(prompts, links, strict=True))
            ]
            answers = await asyncio.gather(*jobs)
        assert answers == [fake_output(prompt, 200 + n) for n, prompt in enumerate(prompts)]
        tap.close()

    run(body)
    assert len(seen) > 1000
    assert SECRET.encode() not in seen
    assert b"request-1" not in seen


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, seen: bytearray) -> None:
    while data := await reader.read(1 << 16):
        seen += data
        writer.write(data)
    writer.close()


def refusal(address: GangAddress) -> TensorweaveError:
    async def connect() -> None:
        with pytest.raises(TensorweaveError) as refused:
            await SocketLink.connect(address, timeout_s=WAIT_S)
        errors.append(refused.value)

    errors: list[TensorweaveError] = []
    run(connect)
    return errors[0]


def test_a_certificate_of_another_authority_is_refused(address: GangAddress, files: TlsFiles, tmp_path: Path) -> None:
    other = make_files(tmp_path / "other")
    distrusting = refusal(replace(address, tls=other))
    assert isinstance(distrusting, WireError)
    assert "the peer's certificate is refused: " in distrusting.message
    distrusted = refusal(replace(address, tls=replace(other, authority=files.authority)))
    assert isinstance(distrusted, WireError | NotReady)
    assert "alert unknown ca" in distrusted.message or "before its hello" in distrusted.message


def test_an_expired_certificate_is_refused(address: GangAddress, files: TlsFiles, tmp_path: Path) -> None:
    expired = replace(make_files(tmp_path / "expired", days_left=-1), authority=files.authority)
    assert isinstance(refusal(replace(address, tls=expired)), WireError | NotReady)


def test_the_secret_is_asked_for_as_well(address: GangAddress) -> None:
    assert "wrong secret" in refusal(replace(address, secret="guessed")).message


def test_a_peer_without_tls_is_refused(address: GangAddress) -> None:
    assert isinstance(refusal(replace(address, tls=None)), WireError | NotReady)


@pytest.mark.parametrize(
    "noise",
    [b"\x00" * 100, b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\xff\xff" + b"\x41" * 70_000],
    ids=["zeros", "http", "long record"],
)
def test_garbage_is_hung_up_on(address: GangAddress, noise: bytes) -> None:
    """It is answered with an alert at most."""
    with (
        socket.create_connection((address.host, address.port), timeout=WAIT_S) as sock,
        contextlib.suppress(ConnectionResetError, BrokenPipeError),
    ):
        sock.sendall(noise)
        assert len(b"".join(iter(lambda: sock.recv(4096), b""))) < 100
    test_answers_are_encrypted(address)


def test_a_silent_stranger_is_hung_up_on(address: GangAddress, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "HELLO_TIMEOUT_S", 0.2)
    started_s = time.monotonic()
    with socket.create_connection((address.host, address.port), timeout=WAIT_S) as sock:
        sock.sendall(b"\x16")
        while sock.recv(4096):
            pass
    assert time.monotonic() - started_s < WAIT_S


def test_a_leader_stops_while_a_stranger_shakes_hands(files: TlsFiles) -> None:
    executor = FakeExecutor()
    leader = LeaderServer(executor, HOST, SECRET, tls=files.accepting())
    with socket.create_connection((HOST, leader.start()), timeout=WAIT_S) as sock:
        sock.sendall(b"\x16")
        leader.stop(WAIT_S)
        assert not leader._loop_thread.is_alive()
        executor.shutdown()


def test_a_link_to_a_leader_without_tls_is_refused(files: TlsFiles) -> None:
    executor = FakeExecutor()
    leader = LeaderServer(executor, HOST, SECRET)
    try:
        error = refusal(replace(address_of(leader.start()), tls=files))
        assert isinstance(error, WireError | NotReady)
    finally:
        leader.stop(WAIT_S)
        executor.shutdown()
