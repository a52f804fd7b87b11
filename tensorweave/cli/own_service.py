"""A service for one command alone, on free ports of 127.0.0.1: `batch` and `eval` use it if no `--url` is given."""

from __future__ import annotations

import argparse
import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from tensorweave.cli.arguments import add_api_key, add_changes
from tensorweave.cli.serve import config_changes, config_path

if TYPE_CHECKING:
    from tensorweave.deploy.config import ServeConfig


def add_service(parser: argparse.ArgumentParser) -> None:
    """`--url`, or what a service of its own is started with."""
    parser.add_argument("--url", help="a running service (default: start one for this command)")
    add_api_key(parser)
    own = parser.add_argument_group("a service of its own")
    own.add_argument("--config", type=Path, metavar="FILE", help="the service's YAML (default: that of `serve`)")
    own.add_argument("--model", help="serve this model: a directory, a hub id, or smollm2")
    add_changes(parser, "change a key of the configuration, for example a.b=c")


@contextlib.contextmanager
def service_url(args: argparse.Namespace) -> Iterator[str]:
    """`--url` without `/v1`, else that of a new service, which ends with the context. Call it from the main thread.

    Raises:
        ValueError: The URL or the configuration is wrong.
        TensorweaveError: The service does not start.
    """
    if args.url is not None:
        if args.config is not None or args.changes:
            raise ValueError("--config and --set are for a service of this command's own: leave --url out, or those")
        yield checked_url(args.url)
        return
    config = service_config(args)
    from tensorweave.deploy.service import running  # imports ray for a second, after the file was checked

    with running(config) as url:
        yield url


def service_config(args: argparse.Namespace) -> ServeConfig:
    """The configuration of a service of this command's own, on loopback without TLS, at new ports each time."""
    from tensorweave.deploy.config import load_config

    port, proxy_port, admin_port = _free_ports(3)
    hosts = ["router.host=127.0.0.1", "admin.host=127.0.0.1", "router.replicas=1", "router.tls=null", "admin.tls=null"]
    ports = [f"router.port={port}", f"router.proxy_port={proxy_port}", f"admin.port={admin_port}"]
    return load_config(config_path(args.config), [*hosts, *ports, *config_changes(args)])


def checked_url(url: str) -> str:
    import httpx

    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise ValueError(f"--url: {error}") from None
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ValueError(f"--url: {url!r} is not of the form http://host:port")
    return url.rstrip("/").removesuffix("/v1")


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as probes:
        sockets = [probes.enter_context(socket.socket()) for _ in range(count)]
        for probe in sockets:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in sockets]
