"""Ray's token authentication: a token for a private cluster, and whether another cluster asks for one.

Ray unpickles what reaches its ports, the internal ports of Serve's replicas among them: without a token, whoever
reaches a cluster runs code on it. Called by `cluster.ray_session` and by deploy.
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from typing import Final

import grpc
import ray

from tensorweave.cluster.ray_internals import check_alive, reload_token

_MODE: Final = "RAY_AUTH_MODE"
_TOKEN: Final = "RAY_AUTH_TOKEN"
_TOKEN_PATH: Final = "RAY_AUTH_TOKEN_PATH"
_PROBE_TIMEOUT_S: Final = 10.0

OPEN_RAY: Final = (
    "the Ray cluster asks for no token, so whoever reaches its ports can run code on it. Start Ray on every node with "
    "RAY_AUTH_MODE=token and the same RAY_AUTH_TOKEN_PATH, and this process too"
)


class UnauthenticatedRay(ValueError):
    """The cluster lets in whoever reaches it."""


@contextlib.contextmanager
def token_mode() -> Iterator[None]:
    """Ray started inside asks for a token: the one that the environment gives, else a random one.

    Ray's processes inherit it; it is in no file, log or command line. This process keeps it when the block has ended,
    until `forget_token`; what else it starts does not see it.
    """
    before = {name: os.environ.get(name) for name in (_MODE, _TOKEN)}
    os.environ[_MODE] = "token"
    if _TOKEN_PATH not in os.environ:
        os.environ.setdefault(_TOKEN, secrets.token_hex(32))
    forget_token()
    try:
        yield
    except BaseException:
        _restore(before)
        forget_token()
        raise
    _restore(before)


def forget_token() -> None:
    """From here on Ray's mode and token in this process are what the environment says."""
    reload_token()


def asks_for_token(gcs_address: str) -> bool:
    """Whether the cluster refuses a peer that shows no token (but a certificate, where Ray uses TLS).

    Raises:
        ConnectionError: nobody answers at the address.
    """
    uses_tls = os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true")
    try:
        check_alive(gcs_address, uses_tls=uses_tls, timeout_s=_PROBE_TIMEOUT_S)
    except grpc.RpcError as error:
        if error.code() == grpc.StatusCode.UNAUTHENTICATED:
            return True
        raise ConnectionError(f"Ray does not answer at {gcs_address}: {error.code().name}") from error
    return False


def refuse_open_ray(*, is_allowed: bool) -> None:
    """Raises UnauthenticatedRay if the cluster of this process asks for no token and nobody has allowed that."""
    if not is_allowed and not asks_for_token(ray.get_runtime_context().gcs_address):
        raise UnauthenticatedRay(
            f"{OPEN_RAY}; or, where no stranger reaches this network, set security.allow_unauthenticated_ray"
        )


def _restore(values: dict[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
