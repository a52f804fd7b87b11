"""Mixtures of experts on a GPU: routing, grouping and the experts' products without a word to the host.

Grids depend on the number of tokens alone, so that a step can be captured in a CUDA graph whatever the router chooses.
One token's experts are read by vectors. Of few tokens, a program reads its part of one expert for all tokens that chose
it: a step reads each chosen expert once. Of many, a program computes a tile of rows of one expert.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator, no-untyped-call"

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Self

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from tensorweave.kernels.linear.triton_thin import ResidualSum
from tensorweave.kernels.mixture.stack import ExpertStack
from tensorweave.kernels.mixture.tiling import ExpertTiling, MixtureTilings, choose_mixture_tilings
from tensorweave.kernels.mixture.triton_kernels import down_few, gated_few, group_pairs, route_rows, sum_parts
from tensorweave.kernels.mixture.triton_one import down_one, gated_one
from tensorweave.kernels.mixture.triton_wide import down_wide, gated_wide

# T tokens, E experts, S chosen experts of a token, D hidden size, I intermediate width; a pair is a token and one of
# its experts, numbered token * S + place; Q sums of squares per token

_GROUPED_AT_ONCE: Final = (256, 2048, 4096)
"""Pairs: few numbers, so that few kernels are compiled."""


@dataclass(frozen=True, slots=True)
class RoutedPairs:
    """Experts of each token, ascending, and their weights; pairs in the order of experts, and where each begins."""

    experts_TS: Tensor
    weights_TS: Tensor
    order: Tensor
    starts: Tensor

    @classmethod
    def empty(cls, num_tokens: int, stack: ExpertStack, device: torch.device) -> Self:
        S, E = stack.routing.num_chosen, stack.num_experts
        return cls(
            torch.empty(num_tokens, S, dtype=torch.int32, device=device),
            torch.empty(num_tokens, S, dtype=torch.float32, device=device),
            torch.empty(num_tokens * S, dtype=torch.int32, device=device),
            torch.empty(E + 1, dtype=torch.int32, device=device),
        )


def route(
    logits_TE: Tensor, stack: ExpertStack, pairs: RoutedPairs, *, is_grouped: bool = True, pdl: bool = False
) -> None:
    """`kernels.mixture.routing.route`; and with `is_grouped` also `order` and `starts`."""
    T, E = logits_TE.shape
    routing = stack.routing
    assert logits_TE.is_contiguous()
    assert stack.num_experts == E
    route_rows[(T,)](
        logits_TE, pairs.experts_TS, pairs.weights_TS, E=E, EP=triton.next_power_of_2(E), S=routing.num_chosen,
        RENORMALIZED=routing.is_renormalized, ROUNDED=routing.is_rounded, PDL=pdl, num_warps=4, launch_pdl=pdl,
    )  # fmt: skip
    if is_grouped:
        count = T * routing.num_chosen
        block = next((each for each in _GROUPED_AT_ONCE if each >= count), _GROUPED_AT_ONCE[-1])
        group_pairs[(E,)](
            pairs.experts_TS, pairs.starts, pairs.order, count, E=E, BLOCK=block, PDL=pdl,
            num_warps=min(8, block // 256), launch_pdl=pdl,
        )  # fmt: skip


def choose_tilings(num_tokens: int, stack: ExpertStack, *, is_scaled: bool) -> MixtureTilings:
    """`is_scaled`: there are squares, and the sum goes to a `ResidualSum`."""
    S, E = stack.routing.num_chosen, stack.num_experts
    is_hopper = torch.cuda.get_device_capability(stack.down_EDI.device) >= (9, 0)
    can_be_wide = is_hopper and not is_scaled and _has_descriptors(stack)
    itemsize = stack.down_EDI.element_size()
    return choose_mixture_tilings(num_tokens, S, E, can_be_one=is_scaled, can_be_wide=can_be_wide, itemsize=itemsize)


def num_squares(hidden_size: int, tilings: MixtureTilings) -> int:
    """Sums of squares per token that `add_experts` writes into a `ResidualSum`."""
    return 1 if tilings.down.block_m else -(-hidden_size // tilings.down.block_n)


def add_experts(
    x_TD: Tensor,
    logits_TE: Tensor,
    stack: ExpertStack,
    out: Tensor | ResidualSum,
    tilings: MixtureTilings,
    *,
    squares_TQ: Tensor | None = None,
    epsilon: float = 0.0,
    pdl: bool = False,
) -> None:
    """`kernels.mixture.stack.add_experts`: out += the weighted sum of the experts' outputs.

    Args:
        x_TD: contiguous; with `squares_TQ`, the residual times the norm's gain, see `thin_linear`.
        out: [T, D], or a `ResidualSum` whose squares are [T, `num_squares`]. Tilings for one token need that.
        tilings: not for many tokens (`is_wide`) where there are `squares_TQ`.

    Equal bits for a row whatever the other rows are, as long as the tilings are the same.
    """
    T, D = x_TD.shape
    assert x_TD.is_contiguous()
    assert stack.gate_up_E2ID.is_contiguous()
    assert stack.down_EDI.is_contiguous()
    assert stack.gate_up_E2ID.shape == (stack.num_experts, 2 * stack.width, D)
    assert squares_TQ is None or not tilings.gated.is_wide
    if not T:
        return
    pairs, is_grouped = RoutedPairs.empty(T, stack, x_TD.device), tilings.gated.block_m > 0
    gated = torch.empty(T * stack.routing.num_chosen, stack.width, dtype=x_TD.dtype, device=x_TD.device)
    products = _Products(stack, pairs, tilings, T, pdl)
    route(logits_TE, stack, pairs, is_grouped=is_grouped, pdl=pdl)
    products.gate(x_TD, squares_TQ, epsilon, gated)
    if not is_grouped:
        assert isinstance(out, ResidualSum)
        products.add_one(gated, out)
        return
    parts = torch.empty(len(gated), D, dtype=x_TD.dtype, device=x_TD.device)
    products.down(gated, parts)
    _sum_parts(parts, pairs, out, pdl)


@dataclass(frozen=True, slots=True)
class _Products:
    stack: ExpertStack
    pairs: RoutedPairs
    tilings: MixtureTilings
    num_tokens: int
    pdl: bool

    def gate(self, x_TD: Tensor, squares_TQ: Tensor | None, epsilon: float, gated: Tensor) -> None:
        pairs, stack, tiling, D = self.pairs, self.stack, self.tilings.gated, x_TD.shape[1]
        Q = 1 if squares_TQ is None else squares_TQ.shape[1]
        blocks = {"BN": tiling.block_n, "BK": tiling.block_k, "num_warps": tiling.warps}
        sizes: dict[str, Any] = {"D": D, "WIDTH": stack.width, **blocks}
        scaling = {"Q": Q, "QP": triton.next_power_of_2(Q), "SCALED": squares_TQ is not None}
        tiles = triton.cdiv(stack.width, tiling.block_n)
        if not tiling.block_m:
            gated_one[(stack.routing.num_chosen * tiles,)](
                x_TD, stack.gate_up_E2ID, gated, pairs.experts_TS, squares_TQ, epsilon, PDL=self.pdl,
                launch_pdl=self.pdl, **sizes, **scaling,
            )  # fmt: skip
        elif tiling.is_wide:
            descriptor = TensorDescriptor.from_tensor(stack.gate_up_E2ID.view(-1, D), [tiling.block_n, tiling.block_k])
            gated_wide[(self._wide_grid(2 * stack.width, tiling),)](
                x_TD, descriptor, gated, pairs.order, pairs.starts, S=stack.routing.num_chosen,
                **self._expert_sizes, BM=tiling.block_m, STAGES=tiling.stages, **sizes,
            )  # fmt: skip
        else:
            weight, has_descriptor = stack.gate_up_E2ID.view(-1, 2 * D), self._has_descriptors
            gated_few[(stack.num_experts * tiles,)](
                x_TD, self._descriptor(weight, tiling), weight, gated, pairs.order, pairs.starts, squares_TQ, epsilon,
                S=stack.routing.num_chosen, BM=tiling.block_m, STAGES=tiling.stages, TMA=has_descriptor, PDL=self.pdl,
                launch_pdl=self.pdl, **sizes, **scaling,
            )  # fmt: skip

    def down(self, gated: Tensor, parts: Tensor) -> None:
        pairs, stack, tiling, D = self.pairs, self.stack, self.tilings.down, parts.shape[1]
        weight = stack.down_EDI.view(-1, stack.width)
        sizes: dict[str, Any] = {
            "D": D, "WIDTH": stack.width, "BM": tiling.block_m, "BN": tiling.block_n, "BK": tiling.block_k,
            "STAGES": tiling.stages, "num_warps": tiling.warps,
        }  # fmt: skip
        if tiling.is_wide:
            descriptor = TensorDescriptor.from_tensor(weight, [tiling.block_n, tiling.block_k])
            down_wide[(self._wide_grid(D, tiling),)](
                gated, descriptor, parts, pairs.order, pairs.starts, **self._expert_sizes, **sizes
            )
            return
        down_few[(stack.num_experts * triton.cdiv(D, tiling.block_n),)](
            gated, self._descriptor(weight, tiling), weight, parts, pairs.order, pairs.starts,
            TMA=self._has_descriptors, PDL=self.pdl, launch_pdl=self.pdl, **sizes,
        )  # fmt: skip

    def add_one(self, gated: Tensor, out: ResidualSum) -> None:
        pairs, stack, tiling, D = self.pairs, self.stack, self.tilings.down, out.residual_MN.shape[1]
        down_one[(triton.cdiv(D, tiling.block_n),)](
            gated, stack.down_EDI, pairs.experts_TS, pairs.weights_TS, out.residual_MN, out.gain_N, out.gained_MN,
            out.squares_MQ, D=D, WIDTH=stack.width, S=stack.routing.num_chosen, BN=tiling.block_n, BK=tiling.block_k,
            PDL=self.pdl, num_warps=tiling.warps, launch_pdl=self.pdl,
        )  # fmt: skip

    def _wide_grid(self, num_outputs: int, tiling: ExpertTiling) -> int:
        """Tiles of rows that there may be: a last one, not full, of each expert."""
        stack = self.stack
        most = self.num_tokens * stack.routing.num_chosen // tiling.block_m + stack.num_experts
        return most * -(-num_outputs // tiling.block_n)

    def _descriptor(self, weight_NK: Tensor, tiling: ExpertTiling) -> TensorDescriptor | None:
        if not self._has_descriptors:
            return None
        return TensorDescriptor.from_tensor(weight_NK, [tiling.block_n, tiling.block_k])

    @property
    def _has_descriptors(self) -> bool:
        return self.pdl and _has_descriptors(self.stack)

    @property
    def _expert_sizes(self) -> dict[str, int]:
        return {"E": self.stack.num_experts, "EP": triton.next_power_of_2(self.stack.num_experts)}


def _sum_parts(parts: Tensor, pairs: RoutedPairs, out: Tensor | ResidualSum, pdl: bool) -> None:
    residual_TD = out.residual_MN if isinstance(out, ResidualSum) else out
    gained = (out.gain_N, out.gained_MN, out.squares_MQ) if isinstance(out, ResidualSum) else (None, None, None)
    T, D = residual_TD.shape
    assert residual_TD.is_contiguous()
    DP = triton.next_power_of_2(D)
    sum_parts[(T,)](
        parts, pairs.weights_TS, residual_TD, *gained, D=D, DP=DP, S=pairs.experts_TS.shape[1],
        GAINED=isinstance(out, ResidualSum), PDL=pdl, num_warps=min(8, max(1, DP // 512)), launch_pdl=pdl,
    )  # fmt: skip


def _has_descriptors(stack: ExpertStack) -> bool:
    """Whether Hopper's copy engine can read the weights: rows at 16 bytes."""
    return stack.down_EDI.element_size() == 2 and stack.gate_up_E2ID.shape[2] % 8 == 0 and stack.width % 8 == 0
