"""`tensorweave bench transfer`: what moving KV between two ranks costs on this machine, by transport and by size."""

from __future__ import annotations

import argparse
from typing import Any

from tensorweave.cli.figures import aligned, publish, report


def run_transfer(args: argparse.Namespace) -> int:
    from tensorweave.cli.bench_transfer_fetches import SHAPES, bench_fetches, bench_kernels, bench_wire, gpu_names

    gpus = gpu_names()
    devices = (gpus[0], gpus[-1]) if gpus else ("cpu", "cpu")
    transports = args.transports or (["ipc", "nccl", "tcp"] if len(gpus) > 1 else ["tcp"])
    sizes = [size << 20 for size in args.sizes]
    messages = [size << 20 for size in args.messages]
    figures: dict[str, Any] = {"kernels": [], "fetches": []}
    for name in args.shapes or list(SHAPES):
        shape = SHAPES[name]
        figures["kernels"] += [bench_kernels(shape, devices[1], size, args.num_runs) for size in sizes]
        for transport in transports:
            for message in messages if transport != "tcp" else messages[:1]:
                figures["fetches"] += bench_fetches(shape, transport, devices, sizes, message, args.num_runs)
    if "nccl" in transports:
        figures["wire"] = bench_wire(sizes, args.num_runs)
    if "tcp" in transports and not args.shapes:
        figures["bare"] = _against_bare_sockets(args)
    for title in ("kernels", "wire", "fetches", "bare"):
        _print_table(title, figures.get(title, []))
    settings = {"transports": transports, "sizes_mib": args.sizes, "messages_mib": args.messages, "devices": devices}
    publish(report("transfer", settings, {"runs": figures}), args.json)
    return 0


def _against_bare_sockets(args: argparse.Namespace) -> list[dict[str, Any]]:
    from tensorweave.cli.bench_transfer_sockets import SHAPES, measure

    return [measure(shape, max(args.sizes) << 20, args.num_runs).row() for shape in SHAPES]


def _print_table(title: str, rows: list[dict[str, Any]]) -> None:
    if rows:
        print(aligned([[title, *rows[0]], *(["", *map(_shown, row.values())] for row in rows)]), end="\n\n")


def _shown(value: Any) -> str:
    return (
        f"{value:.3g}"
        if isinstance(value, float) and value < 100
        else f"{value:.0f}"
        if isinstance(value, float)
        else str(value)
    )
