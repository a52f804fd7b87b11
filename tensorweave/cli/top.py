"""`tensorweave top`: the live picture of a service in a terminal, from its admin port's `/status`."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from typing import Any, Final

import httpx

from tensorweave.cli.admin_port import add_admin_port, admin_client, answered, reason_in
from tensorweave.cluster.errors import NotReady, RequestRejected

_TIMEOUT_S: Final = 10.0
_CLEAR: Final = "\x1b[H\x1b[J"
_ALTERNATE, _NORMAL = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"
_MIN_WIDTH: Final = 40
_WIDTH_OF_FILES: Final = 1000
_EXAMPLES = """\
examples:
  tensorweave top
  tensorweave top --url http://head:8200 --admin-key KEY
  tensorweave top --once --json | jq .traffic
"""


def add_command(commands: Any) -> None:
    parser = commands.add_parser(
        "top",
        help="watch a running service",
        description="Show what a running service does, every few seconds, until Ctrl-C.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_admin_port(parser)
    parser.add_argument("--interval", type=_interval, default=2.0, metavar="S", help="default: %(default)s")
    parser.add_argument("--once", action="store_true", help="show it once")
    parser.add_argument("--json", action="store_true", help="print the status as JSON, one object per line")
    parser.set_defaults(run=run)


def _interval(text: str) -> float:
    if not 0.5 <= (seconds := float(text)) <= 3600:
        raise argparse.ArgumentTypeError(f"{text} is not between 0.5 and 3600 seconds")
    return seconds


def run(args: argparse.Namespace) -> int:
    with admin_client(args, _TIMEOUT_S) as client:
        if args.once:
            _print(_ask_with_rates(client, args.interval), args.json)
        elif args.json or not sys.stdout.isatty():
            _print_for_ever(client, args)
        else:
            _redraw_for_ever(client, args.interval)
    return 0


def ask(client: httpx.Client) -> dict[str, Any]:
    """Raises NotReady, or RequestRejected with the server's reason."""
    answer, body = answered(client, lambda: client.get("/status"))
    if answer.status_code != 200:
        raise RequestRejected(f"{client.base_url} answered {answer.status_code}: {reason_in(answer, body)}")
    if "traffic" not in body:
        raise RequestRejected(f"{client.base_url} is not an admin port")
    return body


def _ask_with_rates(client: httpx.Client, interval_s: float) -> dict[str, Any]:
    """Rates are known from the second look on, whoever has looked first."""
    status = ask(client)
    if status["window_s"] is None:
        time.sleep(interval_s)
        status = ask(client)
    return status


def _print(status: dict[str, Any], as_json: bool) -> None:
    print(json.dumps(status) if as_json else "\n".join(lines(status, _width())), flush=True)


def _print_for_ever(client: httpx.Client, args: argparse.Namespace) -> None:
    while True:
        _print(ask(client), args.json)
        time.sleep(args.interval)


def _redraw_for_ever(client: httpx.Client, interval_s: float) -> None:
    """On the terminal's second screen, which is left as it was. A port that stops answering is waited for."""
    ask(client)
    print(_ALTERNATE, end="", flush=True)
    try:
        while True:
            try:
                shown = lines(ask(client), _width())
            except NotReady as error:
                shown = [error.message[: _width()]]
            height = shutil.get_terminal_size().lines
            print(_CLEAR + "\n".join(shown[: height - 1]), end="", flush=True)
            time.sleep(interval_s)
    finally:
        print(_NORMAL, end="", flush=True)


def _width() -> int:
    return max(_MIN_WIDTH, shutil.get_terminal_size().columns) if sys.stdout.isatty() else _WIDTH_OF_FILES


# ---- the picture as lines


def lines(status: dict[str, Any], width: int) -> list[str]:
    """The picture, no line longer than `width`. Control characters of what others wrote are not passed on."""
    rows = [*_head(status), "", *_traffic(status["traffic"])]
    for pool in status["pools"]:
        rows += ["", *_pool(pool)]
    rows += ["", *_transfers(status["transfers"]), "", *_faults(status["faults"])]
    return [_plain(row)[:width] for row in rows]


def _plain(text: str) -> str:
    return "".join(character if character.isprintable() else "?" for character in text)


def _head(status: dict[str, Any]) -> list[str]:
    when = time.strftime("%H:%M:%S", time.localtime(status["time_s"]))
    window = "" if status["window_s"] is None else f", rates over {status['window_s']:.0f} s"
    first = f"tensorweave {status['version']}  {status['model']}  {status['health']}  {when}{window}"
    return [first, *([f"  {status['reason']}"] if status["reason"] else [])]


def _traffic(traffic: dict[str, Any]) -> list[str]:
    rates = (
        f"requests/s {_number(traffic['requests_per_s'])}   tokens/s {_number(traffic['output_tokens_per_s'])} out, "
        f"{_number(traffic['prompt_tokens_per_s'])} prompt ({_share(traffic['cached_share'])} cached)"
    )
    latencies = [
        f"{name} {'/'.join(_seconds(traffic[key][f'p{share}_s']) for share in (50, 90, 99))}"
        for name, key in (
            ("TTFT", "time_to_first_token"),
            ("ITL", "inter_token_latency"),
            ("request", "request_latency"),
        )
    ]
    return [
        f"running {traffic['num_running']}   waiting {traffic['num_waiting']}{_wait(traffic)}   {rates}",
        f"p50/p90/p99: {'   '.join(latencies)}",
    ]


def _wait(traffic: dict[str, Any]) -> str:
    return f" (for {_seconds(wait_s)})" if (wait_s := traffic.get("expected_wait_s")) else ""


def _pool(pool: dict[str, Any]) -> list[str]:
    rows = [f"{pool['name']} ({pool['role']}): {pool['num_ready']} of {pool['num_wanted']} gangs ready"]
    if pool.get("pressure") is not None:
        rows.append(f"  pressure {pool['pressure']:.2f}  {pool['pressure_reason'] or ''}".rstrip())
    if pool.get("update"):
        rows.append(f"  update {pool['update']['state']}: {pool['update']['text']}")
    rows += [f"  {text}" for text in (pool["failure"], pool["notice"]) if text]
    rows.append(f"  {'gang':24} {'state':10} {'run':>4} {'wait':>4} {'KV used+cached/all':>20} {'tok/s':>8}  ranks")
    for gang in pool["gangs"]:
        ranks = " ".join(f"{rank['host']}:{rank['pid']}" for rank in gang["ranks"])
        rows.append(
            f"  {gang['gang_id']:24} {gang['state']:10} {gang['num_running']:4} {gang['num_waiting']:4} "
            f"{_blocks(gang['blocks']):>20} {_number(gang['output_tokens_per_s']):>8}  {ranks}"
        )
        if shares := gang.get("stage_busy_shares"):
            rows.append(f"    pipeline stages busy {' '.join(_share(share) for share in shares)}")
        link = gang["rank_link"] or {}
        rows += [f"    {text}" for text in (gang["starting"], gang["reason"], link.get("slow")) if text]
    return rows


def _blocks(blocks: dict[str, int] | None) -> str:
    return "" if blocks is None else f"{blocks['num_used']}+{blocks['num_cached']}/{blocks['num_total']}"


def _transfers(transfers: dict[str, Any]) -> list[str]:
    rows = [
        f"KV transfers: {_bytes(transfers['bytes_per_s'])}/s, {_bytes(transfers['num_bytes'])} in all, "
        f"{transfers['num_open']} open, {transfers['num_failures']} failed"
    ]
    for link in transfers["links"]:
        rate = link["error"] or f"{link['megabytes_per_s']:.0f} MB/s, {link['latency_ms']:.2f} ms"
        rows.append(f"  {link['source']} to {link['target']}: {rate}")
    return rows


def _faults(faults: dict[str, Any]) -> list[str]:
    rows = [
        f"faults of gangs {faults['num_gang_faults']}   attempts replayed {faults['num_retries']}   "
        f"recovered {faults['num_recovered']}   refused {faults['num_rejected']}"
    ]
    for event in faults["events"][:8]:
        when = time.strftime("%H:%M:%S", time.localtime(event["time_s"]))
        rows.append(f"  {when} {event['pool']}: {event['kind']}: {event['text']}")
    return rows


# ---- numbers


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.0%}"


def _seconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value * 1e3:.0f}ms" if value < 1 else f"{value:.1f}s"


def _bytes(value: float | None) -> str:
    if value is None:
        return "-"
    units = iter(("B", "KB", "MB", "GB", "TB"))
    unit = next(units)
    while value >= 1000 and unit != "TB":
        value, unit = value / 1000, next(units)
    return f"{value:.3g} {unit}"
