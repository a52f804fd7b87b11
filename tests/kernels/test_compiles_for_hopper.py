"""Kernels of mixtures and adapters compile for an H100, at the shapes of Qwen3-30B-A3B and Llama-3.1-8B, and their
blocks fit into its shared memory. Runs without a GPU where Triton is installed."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")

from tensorweave.kernels.compile_ahead import compile_ahead  # noqa: E402
from tensorweave.kernels.linear.thin_tiling import GATED, PLAIN, RESIDUAL, choose_tiling  # noqa: E402
from tensorweave.kernels.linear.triton_thin import ResidualSum, SplitWorkspace, thin_linear  # noqa: E402
from tensorweave.kernels.lora.stack import SiteStack  # noqa: E402
from tensorweave.kernels.lora.triton import add_updates  # noqa: E402
from tensorweave.kernels.lora.update import LowRankUpdate  # noqa: E402
from tensorweave.kernels.mixture.routing import Routing  # noqa: E402
from tensorweave.kernels.mixture.stack import ExpertStack  # noqa: E402
from tensorweave.kernels.mixture.tiling import choose_mixture_tilings  # noqa: E402
from tensorweave.kernels.mixture.triton import add_experts, num_squares  # noqa: E402
from tests.kernels.test_compile_ahead import CompilingDriver  # noqa: E402

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="an interpreter compiles nothing"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, the kernels' own tests compile them"),
]

E, S, D, WIDTH = 128, 8, 2048, 768
SHARED_BYTES = 227 * 1024
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def shared_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of every kernel that is compiled."""
    found: list[int] = []
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    monkeypatch.setattr(triton.runtime.driver, "_active", CompilingDriver())
    result = triton.runtime._async_compile.FutureKernel.result

    def noted(future: object, *args: object) -> object:
        kernel = result(future, *args)
        found.append(kernel.metadata.shared)
        return kernel

    monkeypatch.setattr(triton.runtime._async_compile.FutureKernel, "result", noted)
    return found


def empty(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype)


@pytest.mark.parametrize(
    ("num_tokens", "dtype"),
    [(1, BF16), (32, BF16), (256, BF16), (8192, BF16), (32, torch.float32), (1024, torch.float32)],
)
def test_mixtures(num_tokens: int, dtype: torch.dtype, shared_bytes: list[int]) -> None:
    made = partial(empty, dtype=dtype)
    stack = ExpertStack(made(E, 2 * WIDTH, D), made(E, D, WIDTH), Routing(S, is_renormalized=True, is_rounded=True))
    is_scaled = num_tokens <= 128
    tilings = choose_mixture_tilings(
        num_tokens, S, E, can_be_one=is_scaled, can_be_wide=not is_scaled and dtype == BF16, itemsize=dtype.itemsize
    )
    x, logits = made(num_tokens, D), made(num_tokens, E)
    squares = empty(num_tokens, num_squares(D, tilings), dtype=torch.float32)
    out = ResidualSum(made(num_tokens, D), made(D), made(num_tokens, D), squares) if is_scaled else x
    given = empty(num_tokens, 32, dtype=torch.float32) if is_scaled else None
    assert compile_ahead(lambda: add_experts(x, logits, stack, out, tilings, squares_TQ=given, epsilon=1e-6, pdl=True))
    assert max(shared_bytes) <= SHARED_BYTES


@pytest.mark.parametrize("num_rows", [17, 64, 128])
@pytest.mark.parametrize(("places", "rank"), [(8, 16), (16, 64)])
@pytest.mark.parametrize(
    ("epilogue", "N", "K", "bounds"),
    [(PLAIN, 6144, 4096, (4096, 5120)), (RESIDUAL, 4096, 14336, ()), (GATED, 28672, 4096, (14336,))],
)
def test_adapters_in_products_of_few_rows(
    epilogue: int, N: int, K: int, bounds: tuple[int, ...], places: int, rank: int, num_rows: int,
    shared_bytes: list[int],
) -> None:  # fmt: skip
    parts, outputs = len(bounds) + 1, N // 2 if epilogue == GATED else N
    ranks, of_rows = empty(places, dtype=torch.int32), empty(num_rows, dtype=torch.int32)
    stack = SiteStack(empty(parts, places, rank, K), empty(N, places, rank), ranks, bounds, epilogue == GATED)
    update = LowRankUpdate(empty(num_rows, parts, rank), of_rows, stack, reads_early=True)
    tiling = choose_tiling(num_rows, outputs, K, epilogue, has_few=True)
    out: torch.Tensor | ResidualSum = empty(num_rows, outputs)
    if epilogue == RESIDUAL:
        squares = empty(num_rows, tiling.num_squares(N), dtype=torch.float32)
        out = ResidualSum(empty(num_rows, N), empty(N), empty(num_rows, N), squares)
    workspace = SplitWorkspace.create(N, num_rows, 2, torch.device("cpu"))
    x, weight = empty(num_rows, K), empty(N, K)
    more = {"is_gated": epilogue == GATED, "tiling": tiling, "workspace": workspace, "pdl": True}
    assert compile_ahead(lambda: thin_linear(x, weight, out, update=update, **more))
    assert max(shared_bytes) <= SHARED_BYTES


@pytest.mark.parametrize("num_tokens", [1, 64])
def test_adapters(num_tokens: int, shared_bytes: list[int]) -> None:
    for N, K, bounds in ((6144, 4096, (4096, 5120)), (4096, 14336, ()), (28672, 4096, (14336,))):
        parts, is_interleaved = len(bounds) + 1, len(bounds) == 1
        ranks = empty(8, dtype=torch.int32)
        stack = SiteStack(empty(parts, 8, 64, K), empty(N, 8, 64), ranks, bounds, is_interleaved)
        x, places, out = empty(num_tokens, K), empty(num_tokens, dtype=torch.int32), empty(num_tokens, N)
        assert compile_ahead(lambda: add_updates(x, places, stack, out, pdl=True))  # noqa: B023
    assert max(shared_bytes) <= SHARED_BYTES
