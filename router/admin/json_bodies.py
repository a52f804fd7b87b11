"""`JsonBodies`: reads the bodies of an operator's requests, with a limit for each and for all."""

from __future__ import annotations

from typing import Final

from fastapi import Request

from tensorweave.router.http import asgi
from tensorweave.router.http.body_memory import BodyMemory

_NUM_HELD: Final = 16
_TIMEOUT_S: Final = 10.0


class JsonBodies:
    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._memory = BodyMemory(_NUM_HELD * max_bytes)

    async def read(self, request: Request) -> bytes:
        """Raises RequestRejected and Overloaded."""
        with self._memory.share() as share:
            return await asgi.read_json_body(
                request.scope, request.receive, share, max_bytes=self._max_bytes, timeout_s=_TIMEOUT_S
            )
