"""Which batch sizes get a CUDA graph."""

from __future__ import annotations

from itertools import pairwise

import pytest

from tensorweave.cluster.cuda_graph_config import CudaGraphConfig, graph_sizes


def test_padded_sizes_are_dense_where_batches_are_small() -> None:
    sizes = graph_sizes(CudaGraphConfig(), 512)
    assert sizes[:5] == (1, 2, 4, 8, 16)
    assert [b - a for a, b in pairwise(sizes[3:])] == [8] * 31 + [16] * 16
    assert sizes[-1] == 512
    assert graph_sizes(CudaGraphConfig(), 700)[-4:] == (512, 576, 640, 700)


@pytest.mark.parametrize("largest", [1, 2, 3, 8, 20, 300])
def test_the_largest_batch_always_has_a_graph(largest: int) -> None:
    for pads in (True, False):
        sizes = graph_sizes(CudaGraphConfig(enable_padding=pads), largest)
        assert sizes[-1] == largest
        assert list(sizes) == sorted(set(sizes))


def test_without_padding_small_batches_have_graphs_of_their_own() -> None:
    assert graph_sizes(CudaGraphConfig(enable_padding=False), 300) == (*range(1, 33), 64, 128, 256, 300)


def test_max_batch_size_is_within_that_of_the_step() -> None:
    assert graph_sizes(CudaGraphConfig(max_batch_size=9), 512) == (1, 2, 4, 8, 9)
    assert graph_sizes(CudaGraphConfig(max_batch_size=900), 8) == (1, 2, 4, 8)


def test_sizes_that_are_given_are_taken_as_far_as_steps_reach() -> None:
    config = CudaGraphConfig(batch_sizes=[64, 1, 16, 1])
    assert graph_sizes(config, 32) == (1, 16)
    assert graph_sizes(config, 512) == (1, 16, 64)
    assert graph_sizes(CudaGraphConfig(batch_sizes=[64, 1], max_batch_size=64), 64) == (1, 64)


@pytest.mark.parametrize("fields", [{"batch_sizes": []}, {"batch_sizes": [0]}, {"max_batch_size": -1}])
def test_sizes_that_are_none_are_refused(fields: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(fields))):
        CudaGraphConfig(**fields)  # type: ignore[arg-type]


def test_two_largest_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="max_batch_size is 8, the largest of batch_sizes 4: give one"):
        CudaGraphConfig(batch_sizes=[1, 4], max_batch_size=8)
