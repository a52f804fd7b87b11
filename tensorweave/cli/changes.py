"""`tensorweave scale`, `move` and `update`: change a running service through its admin port."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import httpx

from tensorweave.cli import top
from tensorweave.cli.admin_port import add_admin_port, admin_client, answered, reason_in
from tensorweave.cli.arguments import add_changes, positive
from tensorweave.cluster.errors import NotReady, RequestRejected

_ANSWER_TIMEOUT_S: Final = 3700.0  # a move's work may take an hour
_CONNECT_TIMEOUT_S: Final = 10.0
_LOOK_TIMEOUT_S: Final = 60.0
_POLL_S: Final = 1.0
_SCALE_EXAMPLES = """\
examples:
  tensorweave scale decode 3
  tensorweave scale decode 3 --wait 600 --url http://head:8200 --admin-key KEY
"""
_MOVE_EXAMPLES = """\
examples:
  tensorweave move prefill decode
  tensorweave move decode prefill --gang decode-2.1-0a1b2c --timeout 120
"""
_UPDATE_EXAMPLES = """\
examples:
  tensorweave update --config service.yaml
  tensorweave update --config service.yaml --set engine.max_batch_size=64 --wait 1800
"""


def add_commands(commands: Any) -> None:
    scale = _add(commands, "scale", "change the number of a pool's gangs", _SCALE_EXAMPLES, run_scale)
    scale.add_argument("pool")
    scale.add_argument("replicas", type=positive, metavar="N", help="gangs; those that are removed drain")
    scale.add_argument("--wait", type=float, default=0.0, metavar="S", help="wait so long until they are ready")
    move = _add(commands, "move", "move a gang between prefill and decode", _MOVE_EXAMPLES, run_move)
    move.add_argument("source", help="the pool that gives a gang away, once its work has ended")
    move.add_argument("target", help="the pool in which it serves then, without a restart")
    move.add_argument("--gang", metavar="ID", help="default: the newest")
    move.add_argument("--timeout", type=float, metavar="S", help="for its work (default: limits.drain_timeout_s)")
    update = _add(commands, "update", "replace a service's gangs without an interruption", _UPDATE_EXAMPLES, run_update)
    update.add_argument("--config", type=Path, required=True, metavar="FILE", help="the changed YAML of the service")
    add_changes(update, "change a key of the configuration")
    update.add_argument("--wait", type=float, default=0.0, metavar="S", help="wait so long until it is done")


def _add(
    commands: Any, name: str, text: str, examples: str, run: Callable[[argparse.Namespace], int]
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=text,
        description=f"{text[0].upper()}{text[1:]}.",
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_admin_port(parser)
    parser.set_defaults(run=run)
    return parser


def run_scale(args: argparse.Namespace) -> int:
    with _client(args) as client:
        _post(client, "/scale", {"pool": args.pool, "replicas": args.replicas})
        print(f"pool {args.pool}: {args.replicas} gangs are wanted", flush=True)
        if args.wait:
            _wait(client, args.wait, lambda pools: _has_size(pools[args.pool], args.replicas))
            print(f"pool {args.pool}: they are ready")
    return 0


def run_move(args: argparse.Namespace) -> int:
    asked = {"source": args.source, "target": args.target, "gang_id": args.gang, "timeout_s": args.timeout}
    with _client(args) as client:
        moved = _post(client, "/move", {name: value for name, value in asked.items() if value is not None})
    print(f"gang {moved['gang_id']} has moved from {args.source} to {args.target}")
    return 0


def run_update(args: argparse.Namespace) -> int:
    from tensorweave.deploy.config import load_config

    config = load_config(args.config, args.changes)
    with _client(args) as client:
        replaced = _post(client, "/update", {"config": config.to_plain()})["replaced_pools"]
        print(f"pools whose gangs are replaced: {', '.join(replaced) or 'none'}", flush=True)
        if not args.wait:
            return 0
        pools = _wait(client, args.wait, lambda pools: not any(pool["is_updating"] for pool in pools.values()))
    updates = {name: pool["update"] for name, pool in pools.items() if name in replaced and pool["update"]}
    for name, update in updates.items():
        print(f"pool {name}: {update['state']}: {update['text']}")
    return 1 if any(update["state"] == "stopped" for update in updates.values()) else 0


def _has_size(pool: Mapping[str, Any], replicas: int) -> bool:
    return bool(pool["num_wanted"] == pool["num_ready"] == len(pool["gangs"]) == replicas)


def _client(args: argparse.Namespace) -> httpx.Client:
    return admin_client(args, httpx.Timeout(_LOOK_TIMEOUT_S, connect=_CONNECT_TIMEOUT_S))


def _post(client: httpx.Client, path: str, content: Mapping[str, Any]) -> dict[str, Any]:
    """Raises NotReady, or RequestRejected with the server's reason."""
    timeout = httpx.Timeout(_ANSWER_TIMEOUT_S, connect=_CONNECT_TIMEOUT_S)
    answer, body = answered(client, lambda: client.post(path, json=content, timeout=timeout))
    if answer.status_code != 200:
        raise (NotReady if answer.status_code >= 500 else RequestRejected)(reason_in(answer, body))
    return body


def _wait(
    client: httpx.Client, timeout_s: float, is_so: Callable[[Mapping[str, dict[str, Any]]], bool]
) -> Mapping[str, dict[str, Any]]:
    """The pools by name, once it is so. Raises NotReady. A service that is busy with a change may not answer, or know
    nothing of its pools, for a while."""
    end_s = time.monotonic() + timeout_s
    while True:
        try:
            pools = {pool["name"]: pool for pool in top.ask(client)["pools"]}
        except NotReady:
            pools = {}
        if pools and is_so(pools):
            return pools
        if time.monotonic() > end_s:
            raise NotReady(f"not within {timeout_s:g} s; `tensorweave top` shows how far it is")
        time.sleep(_POLL_S)
