"""What a device engine's weights take in, so that its kernels need not know of it: factors, and other rotations.

The kernels turn element i of a head with element i + H / 2, for all i. Where a model turns neighbours, or some elements
alone, queries and keys come in another order of their elements, and what is not turned has an angle of 0. Scores are
sums over elements, so that their order does not matter.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from tensorweave.kernels.linear.reference import (
    GroupedFloatLinear,
    GroupedLinear,
    Linear,
    QuantizedLinear,
    TorchLinear,
)

# L positions, H head dim, W elements of a head that are turned, N outputs


def scaled(linear: Linear, factor: float) -> Linear:
    """The same product times a factor."""
    if factor == 1.0:
        return linear
    match linear:
        case TorchLinear():
            return TorchLinear(linear.weight_NK.mul_(factor), _times(linear.bias_N, factor))
        case QuantizedLinear():
            weight = replace(linear.weight, scales_N=linear.weight.scales_N * factor)
            return QuantizedLinear(weight, _times(linear.bias_N, factor))
        case GroupedLinear():
            minimums_NG = _times(linear.weight.minimums_NG, factor)
            grouped = replace(
                linear.weight, scales_NG=linear.weight.scales_NG.float() * factor, minimums_NG=minimums_NG
            )
            return GroupedLinear(grouped, _times(linear.bias_N, factor))
        case GroupedFloatLinear():
            floats = replace(linear.weight, scales_NG=linear.weight.scales_NG * factor)
            return GroupedFloatLinear(floats, _times(linear.bias_N, factor))
        case _:
            raise AssertionError(f"no factor for {type(linear).__name__}")


def _times(tensor: Tensor | None, factor: float) -> Tensor | None:
    return None if tensor is None else tensor * factor


def head_order(head_dim: int, width: int, *, has_neighbours: bool) -> Tensor | None:
    """[H]: which element of a head comes to each place; None: as they are."""
    if width == head_dim and not has_neighbours:
        return None
    turned = torch.arange(width).view(-1, 2).T if has_neighbours else torch.arange(width).view(2, -1)
    rest = torch.arange(width, head_dim).view(2, -1)
    return torch.cat([turned, rest], dim=1).flatten()


def whole_table(table_LW: Tensor, head_dim: int) -> Tensor:
    """[L, H]: with cosines of 1 and sines of 0 for what is not turned."""
    L, W = table_LW.shape
    cosines, sines = table_LW.chunk(2, dim=1)
    rest = (head_dim - W) // 2
    ones, zeros = (torch.full((L, rest), value, dtype=table_LW.dtype, device=table_LW.device) for value in (1.0, 0.0))
    return torch.cat([cosines, ones, sines, zeros], dim=1)


def with_heads_in_order(linear: Linear, order_H: Tensor, num_turned: int) -> Linear:
    """Reorder a product whose first `num_turned` outputs are queries and keys, head by head."""
    H, device = len(order_H), order_H.device
    starts = torch.arange(0, num_turned, H, device=device)
    turned_N = (starts.unsqueeze(1) + order_H).flatten()
    match linear:
        case TorchLinear():
            weight_NK, bias_N = linear.weight_NK.clone(), linear.bias_N
            weight_NK[:num_turned] = linear.weight_NK[turned_N]
            return TorchLinear(weight_NK, _in_order(bias_N, turned_N))
        case QuantizedLinear():
            values_NK, scales_N = linear.weight.values_NK.clone(), _in_order(linear.weight.scales_N, turned_N)
            assert scales_N is not None
            bytes_NK = values_NK.view(torch.uint8)
            bytes_NK[:num_turned] = linear.weight.values_NK.view(torch.uint8)[turned_N]
            weight = replace(linear.weight, values_NK=values_NK, scales_N=scales_N)
            return QuantizedLinear(weight, _in_order(linear.bias_N, turned_N))
        case GroupedLinear() | GroupedFloatLinear():
            rest_N = torch.arange(num_turned, linear.weight.num_outputs, device=device)
            bias_N = _in_order(linear.bias_N, turned_N)
            order_N = torch.cat([turned_N, rest_N])
            if isinstance(linear, GroupedLinear):
                return GroupedLinear(linear.weight.reordered(order_N), bias_N)
            return GroupedFloatLinear(linear.weight.reordered(order_N), bias_N)
        case _:
            raise AssertionError(f"no order of heads for {type(linear).__name__}")


def _in_order(numbers_N: Tensor | None, turned_N: Tensor) -> Tensor | None:
    if numbers_N is None:
        return None
    ordered_N = numbers_N.clone()
    ordered_N[: len(turned_N)] = numbers_N[turned_N]
    return ordered_N
