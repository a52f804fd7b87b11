"""A running service's admin port, as commands ask it."""

from __future__ import annotations

import argparse
import ssl
from collections.abc import Callable
from typing import Any, Final

import httpx

from tensorweave.cluster.errors import NotReady

_DEFAULT_URL: Final = "http://127.0.0.1:8200"


def add_admin_port(parser: argparse.ArgumentParser) -> None:
    """`--url` and `--admin-key`."""
    parser.add_argument("--url", default=_DEFAULT_URL, help="the service's admin port (default: %(default)s)")
    parser.add_argument("--admin-key", metavar="KEY", help="one of security.admin_keys, where there are any")


def admin_client(args: argparse.Namespace, timeout: httpx.Timeout | float) -> httpx.Client:
    """A client of the port that the command line names."""
    headers = {"x-api-key": args.admin_key} if args.admin_key else {}
    verify = ssl.create_default_context()  # with SSL_CERT_FILE, if that is set
    return httpx.Client(base_url=args.url, headers=headers, timeout=timeout, trust_env=False, verify=verify)


def answered(client: httpx.Client, send: Callable[[], httpx.Response]) -> tuple[httpx.Response, dict[str, Any]]:
    """The answer to what `send` asks, and its JSON. Raises NotReady if there is none."""
    try:
        answer = send()
        body: dict[str, Any] = answer.json()
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise NotReady(f"no admin port answers at {client.base_url}: {error}") from None
    except ValueError:
        raise NotReady(f"{client.base_url} is not an admin port: its answer is no JSON") from None
    return answer, body


def reason_in(answer: httpx.Response, body: dict[str, Any]) -> str:
    """Why the port refused."""
    message: str = body.get("error", {}).get("message", answer.reason_phrase)
    return message
