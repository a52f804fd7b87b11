"""`AdminAccess`: who may use the admin port.

    admin keys are set ────────────▶ whoever sends one: as a bearer token, as `x-api-key`, or as the password of HTTP's
                                     basic authentication, for which a browser asks
    only API keys are set ─────────▶ nobody: API keys are for clients
    no keys are set ───────────────▶ whoever reaches the port, by a name that is this host's own

A browser sends a password with every request to the port, whichever page causes it, and any page may call a port of the
host that it is opened on. So requests that a page of another origin causes are refused, and, if no key protects the
port, so are names that may have been made to resolve to this host (DNS rebinding).
"""

from __future__ import annotations

import base64
import binascii
import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Receive, Scope, Send

from tensorweave.cluster.errors import RequestRejected
from tensorweave.router.http import asgi
from tensorweave.router.http.keys import KeyRing, refuse_without_key

_CHALLENGE: Final = b'Basic realm="tensorweave admin", charset="UTF-8"'
_NO_KEY: Final = (
    "the admin port requires a key of security.admin_keys, as 'Authorization: Bearer KEY', as 'x-api-key: KEY' or as "
    "the password of basic authentication; the request has none that is valid"
)
_NO_ADMIN_KEYS: Final = (
    "this service has API keys (security.api_keys) and no admin keys, so nobody may use its admin port: set "
    "security.admin_keys"
)
_OWN_NAMES: Final = frozenset({"localhost", "localhost.localdomain"})


class ForeignRequest(RequestRejected):
    http_status, code = 403, "foreign_request"


@dataclass(frozen=True, slots=True)
class AdminKeys:
    """`digests` of the admin keys. `has_api_keys`: whether clients need a key. `host` is what the port listens on."""

    digests: Sequence[str] = ()
    has_api_keys: bool = False
    host: str = "127.0.0.1"


class AdminAccess:
    """ASGI middleware."""

    def __init__(self, app: ASGIApp, keys: AdminKeys) -> None:
        self._app = app
        self._keys = keys
        self._ring = KeyRing(keys.digests)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
        elif self._needs_key and not self._has_key(scope):
            message = _NO_KEY if self._keys.digests else _NO_ADMIN_KEYS
            await refuse_without_key(scope, send, message, challenge=_CHALLENGE)
        elif (why := self._foreign(scope)) is not None:
            await asgi.send_error(scope, send, ForeignRequest(why))
        else:
            await self._app(scope, receive, send)

    @property
    def _needs_key(self) -> bool:
        return bool(self._keys.digests) or self._keys.has_api_keys

    def _has_key(self, scope: Scope) -> bool:
        return self._ring.opens(scope) or self._ring.has(_password(scope))

    def _foreign(self, scope: Scope) -> str | None:
        """Why a request is refused that a page of another origin may have caused."""
        host = (asgi.header(scope, b"host") or b"").decode("latin-1")
        origin = asgi.header(scope, b"origin")
        site = asgi.header(scope, b"sec-fetch-site") or b"none"
        is_navigation = scope["method"] in ("GET", "HEAD") and asgi.header(scope, b"sec-fetch-mode") == b"navigate"
        if site not in (b"none", b"same-origin") and not is_navigation:
            return "a page of another origin has caused this request"
        if origin is not None and urlsplit(origin.decode("latin-1")).netloc != host:
            return "a page of another origin has caused this request"
        if not self._needs_key and not self._is_own_name(host):
            return "the port has no key, so it answers only to this host's own names and addresses (the header 'host')"
        return None

    def _is_own_name(self, host: str) -> bool:
        name = urlsplit(f"//{host}").hostname or ""
        if name in _OWN_NAMES or name == self._keys.host:
            return True
        try:
            return ipaddress.ip_address(name).is_loopback
        except ValueError:
            return False


def _password(scope: Scope) -> bytes:
    scheme, _, given = (asgi.header(scope, b"authorization") or b"").partition(b" ")
    if scheme.lower() != b"basic":
        return b""
    try:
        return base64.b64decode(given.strip(), validate=True).partition(b":")[2]
    except binascii.Error:
        return b""
