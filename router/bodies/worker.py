"""The process that reads large bodies for a router (`router/bodies/pool.py`, which starts it and is trusted).

Its standard input has the length of a pickled tokenizer, the tokenizer, then `run` frames. Its standard output has a
`ready` frame, then one frame for each body, `done` or `failed`. It ends when its input ends. A body that takes more
than `CPU_LIMIT_S` of processor time ends it, by a signal from the kernel; so does a body that takes more memory than
`MEMORY_LIMIT_BYTES`.
"""

from __future__ import annotations

import logging
import math
import os
import pickle
import resource
import struct
from typing import BinaryIO, Final

from tensorweave.cluster.errors import TensorweaveError
from tensorweave.cluster.wire import READ_BYTES, Frame, FrameDecoder, pack_frame
from tensorweave.router.bodies.served import ServedModel
from tensorweave.router.bodies.tasks import BY_NAME
from tensorweave.router.text.tokens import Tokenizer

logger = logging.getLogger(__name__)

CPU_LIMIT_S: Final = 10
"""For one body. Processor time, so that other work on the machine is no reason to refuse a body."""
MEMORY_LIMIT_BYTES: Final = 4 << 30
STATE_LENGTH: Final = struct.Struct("<Q")


def main() -> None:
    source, sink = open(0, "rb", closefd=False), _take_stdout()  # noqa: SIM115 (open until the process ends)
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    (length,) = STATE_LENGTH.unpack(source.read(STATE_LENGTH.size))
    tokenizer: Tokenizer = pickle.loads(source.read(length))  # from the parent process
    decoder, first_peak_bytes = FrameDecoder(), _peak_bytes()
    sink.write(pack_frame("ready", 0))
    sink.flush()
    while data := source.read1(READ_BYTES):
        for frame in decoder.feed(data):
            _renew_cpu_limit()
            name, *fields = _answer(frame, tokenizer)
            sink.write(pack_frame(name, _peak_bytes() - first_peak_bytes, *fields))
            sink.flush()


def _take_stdout() -> BinaryIO:
    """Return a copy of standard output, for frames, and redirect what libraries print to standard error."""
    sink = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return sink


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
    try:
        main()
    except BrokenPipeError:
        os._exit(1)  # the router has ended
