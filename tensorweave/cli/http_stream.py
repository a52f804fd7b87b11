"""A small HTTP/1.1 client for one streamed POST at a time over a persistent connection, which times every event.

The load generator uses it instead of a general client, whose own cost per request is as large as what is measured. It
supports what a benchmark needs: JSON bodies, chunked or sized answers, server-sent events.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import time
import urllib.parse
from dataclasses import dataclass, field
from typing import Any

from tensorweave.cli.sse import error_message, event_data, event_reasoning, event_text


class RequestFailed(Exception):
    """One request of a benchmark failed; `kind` is what failures are counted by."""

    def __init__(self, kind: str, message: str = "") -> None:
        super().__init__(f"{kind}: {message}" if message else kind)
        self.kind = kind


@dataclass(slots=True)
class Timeline:
    """When the pieces of one answer arrived, in seconds of `time.perf_counter`."""

    sent_s: float
    piece_s: list[float] = field(default_factory=list)
    text: str = ""
    usage: dict[str, Any] = field(default_factory=dict)
    finish_reason: str | None = None

    @property
    def is_finished(self) -> bool:
        return self.finish_reason is not None

    @property
    def ttft_s(self) -> float:
        return self.piece_s[0] - self.sent_s

    @property
    def e2e_s(self) -> float:
        return self.piece_s[-1] - self.sent_s

    @property
    def num_output(self) -> int:
        """Tokens by the server's count; the number of pieces if it sent none."""
        return int(self.usage.get("completion_tokens") or len(self.piece_s))

    def add(self, event: dict[str, Any], now_s: float) -> None:
        if "error" in event:
            raise RequestFailed("error event", error_message(event, "in the stream"))
        self.usage = event.get("usage") or self.usage
        reasons = [str(choice["finish_reason"]) for choice in event.get("choices") or () if choice.get("finish_reason")]
        text = event_reasoning(event) + event_text(event)
        if text or reasons:
            self.piece_s.append(now_s)
        self.text += text
        self.finish_reason = reasons[-1] if reasons else self.finish_reason


class Connection:
    """One connection to one server; `stream` may be called again after it returned."""

    def __init__(self, url: str, api_key: str | None = None, timeout_s: float = 600.0) -> None:
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError(f"{url!r} is not an http:// or https:// address")
        self._host, self._tls = parts.hostname, parts.scheme == "https"
        self._port = parts.port or (443 if self._tls else 80)
        self._base = parts.path.rstrip("/").removesuffix("/v1")
        self._api_key = api_key
        self._timeout_s = timeout_s
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def stream(
        self, path: str, body: dict[str, Any], *, request_id: str | None = None, timeline: Timeline | None = None
    ) -> Timeline:
        """POST `body` and read the answer's events to the end. A caller that passes a `timeline` also gets the events
        before a failure.

        Raises:
            RequestFailed: refused, timed out, broke off, or ended without a finish reason.
        """
        if timeline is None:
            timeline = Timeline(time.perf_counter())
        try:
            async with asyncio.timeout(self._timeout_s):
                await self._exchange(path, json.dumps(body).encode(), request_id, timeline)
        except TimeoutError:
            self.close()
            raise RequestFailed("timeout", f"{self._timeout_s} s") from None
        except (OSError, EOFError) as error:
            self.close()
            raise RequestFailed("connection", f"{type(error).__name__}: {error}") from None
        except (ValueError, asyncio.LimitOverrunError) as error:
            self.close()
            raise RequestFailed("protocol", f"{type(error).__name__}: {error}") from None
        except RequestFailed:
            self.close()
            raise
        if not timeline.is_finished:
            raise RequestFailed("cut short", "the stream ended without a finish_reason")
        return timeline

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._reader = self._writer = None

    async def _exchange(self, path: str, payload: bytes, request_id: str | None, timeline: Timeline) -> None:
        if self._reader is None or self._writer is None:
            tls = ssl.create_default_context() if self._tls else None
            self._reader, self._writer = await asyncio.open_connection(self._host, self._port, ssl=tls, limit=2**20)
        reader, writer = self._reader, self._writer
        extra = f"Authorization: Bearer {self._api_key}\r\n" if self._api_key else ""
        extra += f"X-Request-Id: {request_id}\r\n" if request_id else ""
        head = (
            f"POST {self._base}{path} HTTP/1.1\r\nHost: {self._host}:{self._port}\r\nContent-Type: application/json\r\n"
            f"Accept: text/event-stream\r\n{extra}Content-Length: {len(payload)}\r\n\r\n"
        )
        timeline.sent_s = time.perf_counter()
        writer.write(head.encode("ascii") + payload)
        await writer.drain()
        status, headers = await self._read_head(reader)
        lines = _Lines()
        whole = b""
        async for data in _body(reader, headers):
            now_s = time.perf_counter()
            if status != 200:
                whole += data
                continue
            for line in lines.feed(data):
                if (event := event_data(line)) is not None:
                    timeline.add(event, now_s)
        if status != 200:
            raise RequestFailed(f"HTTP {status}", _reason(whole))
        if headers.get("connection", "").lower() == "close":
            self.close()

    async def _read_head(self, reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
        first, *rest = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = {
            name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in rest if line)
        }
        return int(first.split()[1]), headers


class _Lines:
    """Splits received bytes into lines."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[str]:
        *lines, self._rest = (self._rest + data).split(b"\n")
        return [line.rstrip(b"\r").decode() for line in lines]


async def _body(reader: asyncio.StreamReader, headers: dict[str, str]) -> Any:
    if "chunked" in headers.get("transfer-encoding", "").lower():
        while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
            yield await reader.readexactly(size)
            await reader.readexactly(2)
        await reader.readuntil(b"\r\n")
    elif "content-length" in headers:
        yield await reader.readexactly(int(headers["content-length"]))
    else:
        while data := await reader.read(2**16):
            yield data


def _reason(body: bytes) -> str:
    try:
        return error_message(json.loads(body), body.decode(errors="replace")[:200])
    except ValueError:
        return body.decode(errors="replace")[:200]
