"""`tensorweave bench transfer`: what moving KV between two ranks costs on this machine, by lane and by size."""

from __future__ import annotations

import argparse
from typing import Any

from tensorweave.cli.figures import aligned, publish, report


def run_transfer(args: argparse.Namespace) -> int:
    from tensorweave.workers.transfer.bench import SHAPES, bench_fetches, bench_kernels, bench_wire, gpu_names

    gpus = gpu_names()
    devices = (gpus[0], gpus[-1]) if gpus else ("cpu", "cpu")
    lanes = args.lanes or (["ipc", "nccl", "tcp"] if len(gpus) > 1 else ["tcp"])
    sizes = [size << 20 for size in args.sizes]
    parcels = [size << 20 for size in args.parcels]
    figures: dict[str, Any] = {"kernels": [], "fetches": []}
    for name in args.shapes or list(SHAPES):
        shape = SHAPES[name]
        figures["kernels"] += [bench_kernels(shape, devices[1], size, args.num_runs) for size in sizes]
        for lane in lanes:
            for parcel in parcels if lane != "tcp" else parcels[:1]:
                figures["fetches"] += bench_fetches(shape, lane, devices, sizes, parcel, args.num_runs)
    if "nccl" in lanes:
        figures["wire"] = bench_wire(sizes, args.num_runs)
    if "tcp" in lanes and not args.shapes:
        figures["bare"] = _against_bare_sockets(args)
    for title in ("kernels", "wire", "fetches", "bare"):
        _print_table(title, figures.get(title, []))
    settings = {"lanes": lanes, "sizes_mib": args.sizes, "parcels_mib": args.parcels, "devices": devices}
    publish(report("transfer", settings, {"runs": figures}), args.json)
    return 0


def _against_bare_sockets(args: argparse.Namespace) -> list[dict[str, Any]]:
    from tensorweave.workers.transfer.tcp_bench import SHAPES, measure

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
