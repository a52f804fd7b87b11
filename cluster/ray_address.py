"""Whether a Ray head answers at an address, asked before `ray.init`, which waits for minutes without a word."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from typing import Final

from ray.exceptions import AuthenticationError, RayError

from tensorweave.cluster.ray_internals import connect_to_head, find_head

_LISTEN_TIMEOUT_S: Final = 12.0
_ANSWER_TIMEOUT_S: Final = 12.0
_RETRY_S: Final = 0.5


def check_ray_address(
    address: str,
    *,
    connect: Callable[[str], object] = connect_to_head,
    listen_timeout_s: float = _LISTEN_TIMEOUT_S,
    answer_timeout_s: float = _ANSWER_TIMEOUT_S,
) -> None:
    """Returns when a head at `address` (`host:port`, or `auto`) answers us; a head that is just starting is waited for.

    Raises:
        ConnectionError: nobody listens there, what listens is no Ray head, or the head refuses our token.
    """
    if address.startswith("ray://"):
        return
    found = find_head(address)
    if found is None:
        raise ConnectionError(f"there is no Ray cluster at {address!r}")
    host, _, port = found.rpartition(":")
    _await_listener(host.strip("[]"), int(port), listen_timeout_s)
    problems: list[Exception] = []
    asking = threading.Thread(target=_ask, args=(connect, found, problems), name="ask-ray-head", daemon=True)
    asking.start()
    asking.join(answer_timeout_s)
    if asking.is_alive() or (problems and not isinstance(problems[0], AuthenticationError)):
        detail = f" ({problems[0]})" if problems else ""
        raise ConnectionError(
            f"what listens at {found} does not answer as a Ray head within {answer_timeout_s:g} s{detail}; "
            "is that the port of its GCS (6379 by default), and is the Ray version the same?"
        )
    if problems:
        raise ConnectionError(
            f"the Ray head at {found} refuses our token: it is another one than the cluster's, or none. Set "
            "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH (or RAY_AUTH_TOKEN) here as where the head was started"
        )


def _ask(connect: Callable[[str], object], address: str, problems: list[Exception]) -> None:
    try:
        connect(address)
    except RayError as error:
        problems.append(error)


def _await_listener(host: str, port: int, timeout_s: float) -> None:
    end_s = time.monotonic() + timeout_s
    pause = threading.Event()
    while True:
        try:
            socket.create_connection((host, port), timeout=max(0.01, end_s - time.monotonic())).close()
            return
        except OSError as error:
            if time.monotonic() + _RETRY_S >= end_s:
                raise ConnectionError(
                    f"no Ray head listens at {host}:{port} ({error}; tried for {timeout_s:g} s); "
                    "is the cluster up, and is its address right?"
                ) from error
        pause.wait(_RETRY_S)
