"""`tensorweave bench transfer` on a CPU, with small pools."""

from __future__ import annotations

from tensorweave.cli import bench_transfer_sockets
from tensorweave.cli.bench_transfer_fetches import Shape, bench_fetches, bench_kernels


def test_fetches_and_kernels() -> None:
    shape = Shape("small", 2, 2, 16, "float32", 4)
    rows = bench_fetches(shape, "tcp", ("cpu", "cpu"), [1 << 12, 1 << 16], 1 << 20, num_runs=2)
    assert [row["mib"] for row in rows] == [2**-8, 2**-4]
    assert all(row["checked_gb_per_s"] > 0 for row in rows)
    kernels = bench_kernels(shape, "cpu", 1 << 16, num_runs=2)
    assert all(rate > 0 for name, rate in kernels.items() if name.endswith("gb_per_s"))


def test_the_carrier_against_bare_sockets() -> None:
    row = bench_transfer_sockets.measure(Shape("small", 2, 2, 16, "float32", 16), 6 << 20, num_rounds=1).row()
    assert 1 < row["message_mb"] < 3
    assert all(rate > 0 for name, rate in row.items() if name.endswith(("gb_per_s", "bare", "buffer")))
