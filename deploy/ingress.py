"""Serve's direct ingress: settings with which router replicas listen at ports that we choose.

Measured on Ray 2.60, kept-alive GET of a FastAPI route, p50: bare uvicorn 0.12 ms, direct ingress 0.16 ms (0.33 ms when
the app has a thread of its own, Serve's default), Serve's proxy 2.0 to 3.2 ms.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Sequence
from typing import Any

from tensorweave.deploy.config_router import RouterConfig
from tensorweave.router.http.connections import bound_connections


def ingress_env(router: RouterConfig) -> dict[str, str]:
    """Environment that Serve's controller and replicas must start with. It also works in a job's runtime environment.

    The port range has as many ports as there are replicas, so that no replica takes another port, and a freed port can
    be used at once: by default Serve reserves it for minutes, and a replacement replica would wait that long.

    A proxy has 60 s to start, as long as `serve.start` waits for it. By default Serve kills it after three times 5 s,
    which a busy machine exceeds (its imports alone take seconds), and `serve.start` fails with an ActorDiedError.

    gRPC's support for forks is off: it would print a message for each worker process that uvloop forks for request
    bodies. The child executes another program at once and does not use gRPC.
    """
    return {
        "RAY_SERVE_ENABLE_DIRECT_INGRESS": "1",
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(router.port),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(router.port + router.replicas),
        "RAY_SERVE_PORT_QUARANTINE_S": "0",
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",
        "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
        "RAY_SERVE_LOG_TO_STDERR": "0",
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "20",
        "GRPC_ENABLE_FORK_SUPPORT": "0",
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": f"{__name__}.{bound_proxy.__name__}",
    }


def http_options(router: RouterConfig) -> dict[str, Any]:
    """Serve's, for the proxy; its replicas take everything but the port from them."""
    options: dict[str, Any] = {"host": router.host, "port": router.proxy_port}
    if router.tls is not None:
        options |= {"ssl_certfile": router.tls.certificate, "ssl_keyfile": router.tls.key}
    return options


def bound_proxy() -> list[Any]:
    """Serve's proxy calls this before it listens, and expects middleware."""
    bound_connections()
    return []


def taken_ports(host: str, ports: Sequence[int]) -> list[int]:
    """The ports on which another program listens. Raises OSError if `host` is not an address of this machine."""
    taken = []
    family, kind, _, _, address = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0]
    for port in ports:
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((address[0], port))
                probe.listen(1)
            except OSError as error:
                if error.errno in (errno.EADDRINUSE, errno.EACCES):
                    taken.append(port)
                else:
                    raise
    return taken
