"""`ResultFile`: a JSON Lines file that one run of a batch appends whole lines to, and that survives a kill.

A line counts once it is on the disk, with its line end. A last line without one was being written when a run was
killed: it is cut off, and its request is sent again.
"""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final, Self

from tensorweave.cli.batch_input import BadLine, BatchRequest, key_of, load_json

_CHUNK_BYTES: Final = 1 << 16


class ResultFile:
    """Locked from the constructor to `close`; the lock ends with the process, however it ends.

    Raises:
        ValueError: Another run writes this file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        self._waiting: list[bytes] = []
        self._num_queued = self._num_durable = 0
        self._turn = asyncio.Lock()
        self._failure: OSError | None = None
        try:
            self._lock()
            self._cut_torn_line()
            _sync_folder(path.absolute().parent)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        os.close(self._descriptor)

    def keys(self) -> Iterator[str]:
        """Read the keys of the lines in the file. Raises ValueError at one that no batch has written."""
        with self.path.open("rb") as file:
            for number, text in enumerate(file, 1):
                try:
                    yield _key(load_json(text))
                except (ValueError, KeyError, TypeError):
                    raise ValueError(f"{self.path}: line {number} is not a batch's; move the file away") from None

    async def append(self, line: dict[str, Any]) -> None:
        """Return once the line is on the disk. Lines that come while others are being written share one fsync."""
        self._waiting.append(_encode(line))
        self._num_queued += 1
        number = self._num_queued
        async with self._turn:
            if self._failure is not None:
                raise self._failure
            if number > self._num_durable:
                lines, self._waiting = self._waiting, []
                await asyncio.to_thread(self._write, lines)
                self._num_durable += len(lines)

    def _write(self, lines: Sequence[bytes]) -> None:
        rest = memoryview(b"".join(lines))
        try:
            while rest:
                rest = rest[os.write(self._descriptor, rest) :]
            os.fsync(self._descriptor)
        except OSError as error:  # a part may have been written: nothing may follow it
            self._failure = error
            raise

    def _lock(self) -> None:
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{self.path} is being written by another run") from None

    def _cut_torn_line(self) -> None:
        end = size = os.fstat(self._descriptor).st_size
        while end > 0:
            begin = max(0, end - _CHUNK_BYTES)
            at = os.pread(self._descriptor, end - begin, begin).rfind(b"\n")
            if at >= 0:
                end = begin + at + 1
                break
            end = begin
        if end < size:
            os.ftruncate(self._descriptor, end)
            os.fsync(self._descriptor)


def answer_line(request: BatchRequest, status: int, request_id: str, body: Any) -> dict[str, Any]:
    """The output line of an answer or a refusal."""
    response = {"status_code": status, "request_id": request_id, "body": body}
    return {"id": _new_id(), "custom_id": request.custom_id, "response": response, "error": None}


def bad_line(line: BadLine) -> dict[str, Any]:
    error = {"code": line.code, "message": line.message, "line": line.number}
    return {"id": _new_id(), "custom_id": line.custom_id, "response": None, "error": error}


def _new_id() -> str:
    return f"batch_req_{uuid.uuid4().hex}"


def _key(fields: dict[str, Any]) -> str:
    custom_id = fields["custom_id"]
    return key_of(custom_id, 0 if custom_id is not None else fields["error"]["line"])


def _encode(line: dict[str, Any]) -> bytes:
    try:
        return json.dumps(line, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:  # half of a surrogate pair
        return json.dumps(line).encode() + b"\n"


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
