"""The process that forks the workers which read large bodies for a router (`router/bodies/worker_process.py`, which
starts it and is trusted).

Its standard input is a socket: the length of a pickled tokenizer, the tokenizer, then one byte of a `Priority` for each
worker, with the worker's own socket. So what workers import, two seconds of processor time, is imported once, before
there are requests. It ends when its input ends, and its workers with it.

A worker writes a `ready` frame with its process id, then one frame for each `run` frame, `done` or `failed`. When it
has ended, the process that forked it writes `ended` with the status. A body that takes more than `CPU_LIMIT_S` of
processor time ends its worker, by a signal from the kernel; so does a body that takes more memory than
`MEMORY_LIMIT_BYTES`. A worker whose socket is closed is killed.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import math
import os
import pickle
import resource
import select
import signal
import socket
import struct
import sys
from enum import Enum
from typing import Final, NoReturn

from tensorweave.cluster.errors import TensorweaveError
from tensorweave.cluster.priority import lower_priority
from tensorweave.cluster.wire import READ_BYTES, Frame, FrameDecoder, pack_frame
from tensorweave.router.bodies.served import ServedModel
from tensorweave.router.bodies.tasks import BY_NAME
from tensorweave.router.text.tokens import Tokenizer

logger = logging.getLogger(__name__)

CPU_LIMIT_S: Final = 10
"""For one body. Processor time, so that other work on the machine is no reason to refuse a body."""
MEMORY_LIMIT_BYTES: Final = 4 << 30
STATE_LENGTH: Final = struct.Struct("<Q")


class Priority(Enum):
    """A worker's, beside the router's."""

    USUAL = b"u"
    LOW = b"l"


class Forks:
    """Forks the workers, until `control` ends, and says how each has ended."""

    def __init__(self, control: socket.socket, tokenizer: Tokenizer) -> None:
        self._control = control
        self._tokenizer = tokenizer
        self._pids: dict[int, int] = {}
        """By the socket's number here."""
        self._sockets: dict[int, socket.socket] = {}
        """By process."""
        self._poll = select.poll()
        self._poll.register(control, select.POLLIN)
        self._ended, self._told_of_end = socket.socketpair()
        self._told_of_end.setblocking(False)
        self._poll.register(self._ended, select.POLLIN)
        signal.set_wakeup_fd(self._told_of_end.fileno(), warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)

    def run(self) -> None:
        while True:
            for number, _ in self._poll.poll():
                if number == self._control.fileno():
                    priority, received, _, _ = socket.recv_fds(self._control, 1, 1)
                    if not priority:
                        self._kill_all()
                        return
                    self._fork(Priority(priority), socket.socket(fileno=received[0]))
                elif number == self._ended.fileno():
                    self._ended.recv(READ_BYTES)
                    self._reap()
                elif (pid := self._pids.get(number)) is not None:  # the router has closed it
                    self._poll.unregister(number)
                    os.kill(pid, signal.SIGKILL)

    def _fork(self, priority: Priority, connection: socket.socket) -> None:
        pid = os.fork()
        if pid == 0:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for each in (self._control, self._ended, self._told_of_end, *self._sockets.values()):
                each.close()
            _work(connection, priority, self._tokenizer)
        self._pids[connection.fileno()] = pid
        self._sockets[pid] = connection
        self._poll.register(connection, 0)  # that the router closes it is always told

    def _kill_all(self) -> None:
        signal.set_wakeup_fd(-1)
        for pid in self._sockets:
            os.kill(pid, signal.SIGKILL)

    def _reap(self) -> None:
        while self._sockets:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if not pid:
                return
            connection = self._sockets.pop(pid)
            del self._pids[connection.fileno()]
            with contextlib.suppress(KeyError):  # the router had closed it
                self._poll.unregister(connection)
            with contextlib.suppress(OSError), connection:
                connection.setblocking(False)
                connection.sendall(pack_frame("ended", os.waitstatus_to_exitcode(status)))


def main() -> None:
    os.dup2(2, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    control = socket.socket(fileno=0)
    (length,) = STATE_LENGTH.unpack(_receive(control, STATE_LENGTH.size))
    tokenizer: Tokenizer = pickle.loads(_receive(control, length))  # from the parent process
    gc.collect()
    gc.freeze()  # so that workers do not copy the pages of what they share
    Forks(control, tokenizer).run()


def _receive(source: socket.socket, num_bytes: int) -> bytes:
    received = bytearray()
    while len(received) < num_bytes:
        data = source.recv(min(READ_BYTES, num_bytes - len(received)))
        if not data:
            sys.exit(1)
        received += data
    return bytes(received)


def _work(connection: socket.socket, priority: Priority, tokenizer: Tokenizer) -> NoReturn:
    """In a worker, until the router closes the socket."""
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES))
    decoder, first_peak_bytes = FrameDecoder(), _peak_bytes()
    with contextlib.suppress(ConnectionError):  # the router has ended
        connection.sendall(pack_frame("ready", 0, os.getpid()))
        if priority is Priority.LOW:
            lower_priority()
        while data := connection.recv(READ_BYTES):
            for frame in decoder.feed(data):
                _renew_cpu_limit()
                name, *fields = _answer(frame, tokenizer)
                connection.sendall(pack_frame(name, _peak_bytes() - first_peak_bytes, *fields))
    os._exit(0)


def _renew_cpu_limit() -> None:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    limit_s = math.ceil(usage.ru_utime + usage.ru_stime) + CPU_LIMIT_S
    resource.setrlimit(resource.RLIMIT_CPU, (limit_s, resource.RLIM_INFINITY))


def _answer(frame: Frame, tokenizer: Tokenizer) -> Frame:
    name, task_name, served, body = frame
    assert name == "run", name
    task = BY_NAME[task_name]
    try:
        return ["done", *task.pack(task.run(body, tokenizer, ServedModel.from_wire(served)))]
    except TensorweaveError as error:
        return ["failed", error.to_wire()]
    except Exception:  # a request's boundary: an error in one body must not end the worker for all others
        logger.exception("a request body could not be read")
        return ["failed", TensorweaveError("internal error; the server's log has it").to_wire()]


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


if __name__ == "__main__":
    main()
