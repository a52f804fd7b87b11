"""A small OpenAI endpoint that misbehaves on request, for the chat client and the load generator."""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from tests.http_server import PATIENCE_S, serving


class FakeEndpoint(ThreadingHTTPServer):
    """Answers `pieces`, and stops after the first until it `may_go_on`; `trouble` is what goes wrong: refuse,
    error_event, cut, gibberish, or nothing. Where it has an `api_key`, it asks for that."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.pieces = ["The capital", " of France", " is Paris."]
        self.trouble: str | None = None
        self.api_key: str | None = None
        self.bodies: list[dict[str, Any]] = []
        self.num_connections = 0
        self.may_go_on = threading.Event()
        self.may_go_on.set()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that has gone is none: whether it goes before the last write hangs on time."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: FakeEndpoint

    def setup(self) -> None:
        super().setup()
        self.server.num_connections += 1

    def log_message(self, format: str, *args: Any) -> None:
        return None

    def do_GET(self) -> None:
        if not self._has_key():
            return
        self._answer(200, {"object": "list", "data": [{"id": "fake-model", "object": "model"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self._has_key():
            return
        self.server.bodies.append(body)
        if self.server.trouble == "refuse":
            error = {"message": "the queue is full", "type": "rate_limit_error", "code": "overloaded", "param": None}
            self._answer(429, {"error": error}, {"Retry-After": "3"})
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self._stream(is_chat=self.path.endswith("/chat/completions"))

    def _has_key(self) -> bool:
        if self.server.api_key is None or self.headers["Authorization"] == f"Bearer {self.server.api_key}":
            return True
        self._answer(401, {"error": {"message": "no key", "type": "invalid_request_error"}})
        return False

    def _stream(self, *, is_chat: bool) -> None:
        pieces, trouble = self.server.pieces, self.server.trouble
        if is_chat:
            self._event(
                {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]}
            )
        for number, piece in enumerate(pieces):
            if number == 1:
                assert self.server.may_go_on.wait(PATIENCE_S)
            if trouble == "cut" and number == 1:
                self.close_connection = True
                return
            if trouble == "gibberish":
                self._chunk(b"data: {not json\n\n")
            if trouble == "error_event" and number == 1:
                self._event({"error": {"message": "the worker was lost", "type": "server_error"}})
                break
            finish = "stop" if number == len(pieces) - 1 else None
            content = {"delta": {"content": piece}} if is_chat else {"text": piece}
            self._event({"choices": [{"index": 0, **content, "finish_reason": finish}]})
        self._event({"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": len(pieces)}})
        self._chunk(b": a comment\n\ndata: [DONE]\n\n")
        self._chunk(b"")

    def _event(self, data: dict[str, Any]) -> None:
        self._chunk(f"data: {json.dumps(data)}\n\n".encode())

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")

    def _answer(self, status: int, body: dict[str, Any], headers: dict[str, str] | None = None) -> None:
        payload = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(payload)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(payload)


@pytest.fixture
def endpoint() -> Iterator[FakeEndpoint]:
    with serving(FakeEndpoint()) as server:
        yield server
        server.may_go_on.set()
