"""A file descriptor is sent once the socket has room for it: a new process may still have to read what came first."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket

from tensorweave.router.bodies.worker_process import send_fd


def test_a_descriptor_waits_for_room() -> None:
    async def body() -> None:
        ours, theirs = socket.socketpair()
        reading, writing = os.pipe()
        with ours, theirs:
            ours.setblocking(False)
            num_filled = 0
            with contextlib.suppress(BlockingIOError):
                while True:
                    num_filled += ours.send(bytes(4096))
            sending = asyncio.create_task(send_fd(ours, b"x", writing))
            await asyncio.sleep(0)
            assert not sending.done()
            while num_filled:
                num_filled -= len(theirs.recv(min(num_filled, 65536)))
                await asyncio.sleep(0)
            async with asyncio.timeout(60.0):
                await sending
            message, descriptors, _, _ = socket.recv_fds(theirs, 1, 1)
            assert message == b"x"
            os.write(descriptors[0], b"hello")
            assert os.read(reading, 5) == b"hello"
            for descriptor in (*descriptors, reading, writing):
                os.close(descriptor)

    asyncio.run(body())
