"""`LeaderServer` and the links to it: answers, refusals, authentication, silence and the end."""

from __future__ import annotations

import asyncio
import contextlib
import math
import socket
import time
from dataclasses import replace

import pytest

from tensorweave.cluster import socket_link, wire
from tensorweave.cluster.errors import NotReady, Overloaded, RequestRejected, TensorweaveError, WorkerLost
from tensorweave.cluster.protocol import PROTOCOL_VERSION
from tensorweave.cluster.socket_link import SILENCE_LIMIT_S, SocketLink
from tensorweave.workers.fakes.fake_executor import FAKE_INFO, FakeExecutor, fake_output
from tensorweave.workers.leader import server as server_module
from tests.workers.leader.links import (
    ENDLESS,
    HOST,
    PROMPT,
    SECRET,
    address_of,
    connect,
    linked,
    make_request,
    run,
    serving,
    tokens_of,
    until,
)
from tests.workers.waiting import WAIT_S

pytestmark = pytest.mark.usefixtures("patient_links")


def test_many_requests_on_two_links_get_their_own_tokens() -> None:
    async def body() -> None:
        async with linked(address) as one, linked(address) as two:
            assert one.info == FAKE_INFO
            prompts = [[n, n + 1, n * 7] for n in range(30)]
            jobs = [
                tokens_of(link, make_request(f"r{n}", 5 + n, prompt))
                for n, (prompt, link) in enumerate(zip(prompts, [one, two] * 15, strict=True))
            ]
            answers = await asyncio.gather(*jobs)
            assert answers == [fake_output(prompt, 5 + n) for n, prompt in enumerate(prompts)]
            assert one.num_inflight == two.num_inflight == 0
            assert await one.stats(WAIT_S) == [{"iter": executor.num_steps}]

    executor = FakeExecutor()
    with serving(executor) as (leader, address):
        run(body)
        assert leader.num_open == 0


def test_refusals_reach_the_request_and_nobody_else() -> None:
    async def body() -> None:
        async with linked(address) as link:
            executor.hold()
            first = asyncio.create_task(tokens_of(link, make_request("a")))
            await until(lambda: executor.num_requests == 1)
            with pytest.raises(RequestRejected, match="empty") as rejected:
                await tokens_of(link, make_request("b", prompt=[]))
            assert rejected.value.param == "prompt"
            with pytest.raises(Overloaded) as overloaded:
                await tokens_of(link, make_request("c"))
            assert overloaded.value.retry_after_s == 1.0
            with pytest.raises(RequestRejected, match="does not fit"):
                await tokens_of(link, make_request("d", prompt=[2**40]))
            executor.hold(False)
            assert await first == fake_output(PROMPT, 4)

    executor = FakeExecutor(max_requests=1)
    with serving(executor) as (_, address):
        run(body)


def test_leaving_early_cancels_at_the_gang() -> None:
    async def body() -> None:
        async with linked(address) as link:
            async with contextlib.aclosing(link.generate(make_request("a", ENDLESS))) as chunks:
                tokens = list((await anext(chunks)).token_ids)
                assert tokens == fake_output(PROMPT, len(tokens))
                assert executor.num_requests == 1
            await until(lambda: executor.num_requests == 0)
            stuck = asyncio.create_task(tokens_of(link, make_request("b", ENDLESS)))
            await until(lambda: executor.num_requests == 1)
            stuck.cancel()
            await until(lambda: executor.num_requests == 0)
            assert link.is_open
            assert link.num_inflight == 0

    executor = FakeExecutor(step_s=0.001)
    with serving(executor) as (_, address):
        run(body)


def test_a_client_that_vanishes_has_its_requests_cancelled() -> None:
    async def body() -> None:
        async with linked(address) as stays:
            link = await connect(address)
            streams = [asyncio.create_task(tokens_of(link, make_request(f"r{n}", ENDLESS))) for n in range(3)]
            await until(lambda: executor.num_requests == 3 and executor.num_steps > 3)
            executor.hold()
            mine = asyncio.create_task(tokens_of(stays, make_request("mine", 50)))
            await until(lambda: executor.num_requests == 4)
            executor.allow(10)
            link.close()
            results = await asyncio.gather(*streams, return_exceptions=True)
            assert [type(result) for result in results] == [WorkerLost] * 3
            await until(lambda: executor.num_requests == 1)
            executor.hold(False)
            assert await mine == fake_output(PROMPT, 50)

    executor = FakeExecutor(step_s=0.005)
    with serving(executor) as (leader, address):
        run(body)
        assert leader.num_open == 0


def test_a_client_that_does_not_read_is_disconnected_and_the_others_are_served() -> None:
    async def body() -> None:
        sock = socket.create_connection((HOST, address.port))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.sendall(wire.pack_frame("hello", PROTOCOL_VERSION, SECRET))
        executor.hold()
        for n in range(60):
            sock.sendall(wire.pack_frame("add", make_request(f"slow{n}", ENDLESS).to_wire()))
        async with linked(address) as link:
            await until(lambda: executor.num_requests == 60)
            executor.hold(False)
            assert await tokens_of(link, make_request("good", 20)) == fake_output(PROMPT, 20)
            await until(lambda: executor.num_requests == 0)
            assert await tokens_of(link, make_request("later", 20)) == fake_output(PROMPT, 20)
        sock.close()

    executor = FakeExecutor()
    with serving(executor, max_unsent_bytes=64 << 10) as (_, address):
        run(body)


def test_a_failed_executor_ends_every_request_and_the_links() -> None:
    async def body() -> None:
        async with linked(address) as link:
            streams = [asyncio.create_task(tokens_of(link, make_request(f"r{n}", ENDLESS))) for n in range(3)]
            await until(lambda: executor.num_requests == 3)
            executor.fail(WorkerLost("rank 1 is gone"))
            for stream in streams:
                with pytest.raises(WorkerLost, match="rank 1 is gone"):
                    await stream
            await link.wait_closed()
            with pytest.raises(WorkerLost, match="rank 1 is gone"):
                await tokens_of(link, make_request("late"))

    executor = FakeExecutor(step_s=0.002)
    with serving(executor) as (_, address):
        run(body)


def test_a_draining_leader_finishes_open_requests_and_refuses_new_ones() -> None:
    async def body() -> None:
        async with linked(address) as link:
            executor.hold()
            stream = asyncio.create_task(tokens_of(link, make_request("a", 40)))
            await until(lambda: executor.num_requests == 1)
            drained = asyncio.create_task(asyncio.to_thread(leader.drain, WAIT_S))
            await until(lambda: leader._table.is_draining)
            with pytest.raises(NotReady, match="draining"):
                await tokens_of(link, make_request("b"))
            assert not drained.done()
            executor.hold(False)
            assert await stream == fake_output(PROMPT, 40)
            assert await drained

    executor = FakeExecutor()
    with serving(executor) as (leader, address):
        run(body)


def test_a_retired_link_ends_with_its_last_request() -> None:
    async def body() -> None:
        executor.hold()
        link = await connect(address)
        stream = asyncio.create_task(tokens_of(link, make_request("a", 20)))
        await until(lambda: executor.num_requests == 1)
        link.close_when_idle()
        assert link.is_open
        executor.hold(False)
        assert await stream == fake_output(PROMPT, 20)
        assert not link.is_open

    executor = FakeExecutor()
    with serving(executor) as (_, address):
        run(body)


@pytest.mark.parametrize(
    ("first_bytes", "complaint"),
    [
        (wire.pack_frame("hello", PROTOCOL_VERSION, "wrong"), "wrong secret"),
        (wire.pack_frame("add", "x"), "must be hello"),
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "over the limit"),
        (wire.pack_frame("hello", PROTOCOL_VERSION, "x" * 5000), "over the limit"),
        (wire.pack_frame("hello", PROTOCOL_VERSION, SECRET) + wire.pack_frame("add", [1, 2]), "malformed request"),
        (wire.pack_frame("hello", PROTOCOL_VERSION, SECRET) + wire.pack_frame("dance"), "unexpected 'dance'"),
        (
            wire.pack_frame("hello", PROTOCOL_VERSION, SECRET)
            + wire.pack_frame("add", ["r", 5, [], 0, 0, None, None, None, None, 0, 0, 1, None]),
            "token",
        ),
    ],
)
def test_wrong_secrets_and_malformed_frames_are_refused(first_bytes: bytes, complaint: str) -> None:
    async def body() -> None:
        async with linked(address) as link:
            reader, writer = await asyncio.open_connection(HOST, address.port)
            writer.write(first_bytes)
            frames = [frame async for frame in wire.FrameReader(reader)]
            assert frames[-1][0] == "error"
            assert complaint in frames[-1][1]["message"]
            writer.close()
            assert await tokens_of(link, make_request("good")) == fake_output(PROMPT, 4)

    executor = FakeExecutor()
    with serving(executor) as (_, address):
        run(body)
        assert executor.num_requests == 0


def test_the_oldest_of_too_many_unauthenticated_connections_is_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "_MAX_UNAUTHENTICATED", 3)

    async def body() -> None:
        async with linked(address) as link:
            idle = [await asyncio.open_connection(HOST, address.port) for _ in range(10)]
            for reader, _ in idle[:7]:
                with contextlib.suppress(ConnectionResetError):
                    assert await reader.read() == b""
            assert await tokens_of(link, make_request("good")) == fake_output(PROMPT, 4)
            for _, writer in idle:
                writer.close()

    with serving(FakeExecutor()) as (_, address):
        run(body)


def test_connecting_to_no_leader_or_with_a_wrong_secret_fails_in_time() -> None:
    async def body() -> None:
        with pytest.raises(TensorweaveError, match="wrong secret"):
            await connect(replace(address, secret="other"))
        with socket.create_server((HOST, 0)) as mute:
            took_s: list[float] = []
            while len(took_s) < 8 and min(took_s, default=2.0) >= 2.0:  # this machine may pause meanwhile
                before_s = time.monotonic()
                with pytest.raises(NotReady, match="no answer from its leader"):
                    await SocketLink.connect(address_of(mute.getsockname()[1]), timeout_s=0.3)
                took_s.append(time.monotonic() - before_s)
            assert 0.3 <= min(took_s) < 2.0
        with socket.socket() as bound:
            bound.bind((HOST, 0))  # without listening: no other process can take the port
            with pytest.raises(NotReady):
                await SocketLink.connect(address_of(bound.getsockname()[1]), timeout_s=1.0)

    with serving(FakeExecutor()) as (_, address):
        run(body)


def test_a_silent_leader_loses_its_requests_within_ten_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stopped process keeps its sockets open, so only its silence shows. The link counts intervals without frames."""
    assert SILENCE_LIMIT_S < 10.0
    monkeypatch.setattr(socket_link, "SILENCE_LIMIT_S", SILENCE_LIMIT_S)

    async def serve_once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1 << 16)
        writer.write(wire.pack_frame("hello", PROTOCOL_VERSION, FAKE_INFO.to_wire()))
        writers.append(writer)

    writers: list[asyncio.StreamWriter] = []

    async def body() -> None:
        server = await asyncio.start_server(serve_once, HOST, 0)
        link = await connect(address_of(server.sockets[0].getsockname()[1]))
        before_s = time.monotonic()
        with pytest.raises(WorkerLost, match="silent for 5 s"):
            await tokens_of(link, make_request("a"))
        assert time.monotonic() - before_s > 4.0
        [writer] = writers
        writer.close()
        with contextlib.suppress(OSError):  # the link has reset the connection
            await writer.wait_closed()
        server.close()

    run(body)


def test_an_idle_leader_is_not_silent() -> None:
    """It pings several times within the limit, for longer than the limit, and each ping is counted as a word."""
    assert 4 * wire.PING_INTERVAL_S < SILENCE_LIMIT_S
    num_pings = math.ceil((SILENCE_LIMIT_S + 2.0) / wire.PING_INTERVAL_S)

    async def body() -> None:
        async with linked(address) as link:
            executor.hold()
            stream = asyncio.create_task(tokens_of(link, make_request("a")))
            silent_checks: list[int] = []
            receive = link._receive

            def note(frame: wire.Frame) -> None:
                if frame == ["ping"]:
                    silent_checks.append(link._num_silent_checks)
                receive(frame)

            link._receive = note  # type: ignore[method-assign]
            await until(lambda: len(silent_checks) >= num_pings)
            assert set(silent_checks) == {0}
            executor.hold(False)
            assert await stream == fake_output(PROMPT, 4)

    executor = FakeExecutor()
    with serving(executor) as (_, address):
        run(body)


def test_stopping_ends_both_threads_and_the_links() -> None:
    async def body() -> None:
        link = await connect(address)
        stream = asyncio.create_task(tokens_of(link, make_request("a", ENDLESS)))
        await until(lambda: executor.num_requests == 1)
        await asyncio.to_thread(leader.stop, WAIT_S)
        with pytest.raises(WorkerLost, match="shutting down"):
            await stream

    executor = FakeExecutor(step_s=0.002)
    with serving(executor) as (leader, address):
        run(body)
        assert not leader._loop_thread.is_alive()
        assert not leader._pump_thread.is_alive()
