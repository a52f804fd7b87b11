"""Updates by adapters: native ones against the reference, and a row's bits in any batch."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor

from tensorweave.kernels.lora.reference import AdapterKernels, UpdatePart
from tests.kernels.forms import needs_native, operations_of

K, N = 83, 203  # no multiples of anything
PARTS = ((0, 100), (100, 37), (150, 53))  # first output and number of outputs
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-2}


def random_adapter(ranks: tuple[int, ...], dtype: torch.dtype) -> list[list[UpdatePart]]:
    """Three sites: all parts, none, and one part alone."""

    def part(rank: int, first: int, size: int) -> UpdatePart:
        return UpdatePart(torch.randn(rank, K).to(dtype), (torch.randn(size, rank) / 8).to(dtype), first)

    return [
        [part(rank, first, size) for rank, (first, size) in zip(ranks, PARTS, strict=False)],
        [],
        [part(ranks[0], *PARTS[1])],
    ]


def add(
    kernels: AdapterKernels, adapters: list[list[list[UpdatePart]]], of_row: list[int], x: Tensor, site: int
) -> Tensor:
    """To zeros; `of_row` has each row's adapter, -1 for none."""
    packed = [kernels.pack(adapter) for adapter in adapters]
    rows = [(packed[i], [row for row, of in enumerate(of_row) if of == i]) for i in sorted(set(of_row) - {-1})]
    return kernels.plan(rows, len(of_row)).add(site, x, torch.ones(len(x), N, dtype=x.dtype))


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_rows", [1, 3, 7, 150])
def test_native_updates_equal_the_reference(dtype: torch.dtype, num_rows: int) -> None:
    torch.manual_seed(num_rows)
    adapters = [random_adapter(ranks, dtype) for ranks in ((4, 7, 16), (64,), (1, 2), (9, 8, 3))]
    x = torch.randn(num_rows, K).to(dtype)
    of_row = [random.Random(num_rows).randrange(-1, len(adapters)) for _ in range(num_rows)]
    reference = operations_of("reference", dtype).adapters
    native = operations_of("native", dtype).adapters
    for site in range(3):
        expected, got = (add(kernels, adapters, of_row, x, site) for kernels in (reference, native))
        torch.testing.assert_close(got.float(), expected.float(), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
        is_plain = torch.tensor([of == -1 for of in of_row])
        assert (got[is_plain] == 1).all()


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_rows_bits_do_not_depend_on_its_batch(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    adapters = [random_adapter(ranks, dtype) for ranks in ((4, 7, 16), (64,), (9, 8, 3))]
    x = torch.randn(97, K).to(dtype)
    native = operations_of("native", dtype).adapters
    chooser = random.Random(1)
    of_row = [chooser.randrange(-1, 3) for _ in range(97)]
    whole = add(native, adapters, of_row, x, 0)
    for size in (1, 2, 3, 5, 40):
        picked = chooser.sample(range(97), size)
        some = add(native, adapters, [of_row[row] for row in picked], x[picked].contiguous(), 0)
        assert torch.equal(some, whole[picked])


def test_a_step_without_adapters_changes_nothing() -> None:
    out = torch.ones(2, N)
    for form in ("reference", "native"):
        assert operations_of(form, torch.float32).adapters.plan([], 2).add(0, torch.ones(2, K), out) is out
