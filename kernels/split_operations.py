"""`SplitOperations`: a step's kernels on a GPU that has one rank's share of a model.

The norms are part of the sums over ranks (`kernels.ranks`), so products of few rows are those of `thin_linear` without
what follows them.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from tensorweave.kernels.cuda.program import can_run_hopper_kernels
from tensorweave.kernels.linear.thin_tiling import GATED, PLAIN, choose_tiling
from tensorweave.kernels.linear.triton_thin import SplitWorkspace, thin_linear
from tensorweave.kernels.triton_operations import TritonOperations
from tensorweave.kernels.weights import Matrix

# T tokens, J inputs, O outputs, D hidden size, I intermediate width

MAX_THIN_ROWS: Final = 128
_MAX_SPLITS: Final = 2


class SplitOperations(TritonOperations):
    """Products of up to `MAX_THIN_ROWS` rows by `thin_linear`, where its kernels are for them."""

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self._max_thin_rows = MAX_THIN_ROWS if self._has_pdl else 0
        self._has_few = can_run_hopper_kernels(device)
        self._split_workspaces: dict[int, SplitWorkspace] = {}

    def product(self, x_TJ: Tensor, matrix: Matrix, out_TO: Tensor) -> None:
        if not self._is_thin(x_TJ, matrix):
            super().product(x_TJ, matrix, out_TO)
            return
        T, O = out_TO.shape  # noqa: E741
        tiling = choose_tiling(T, O, x_TJ.shape[1], PLAIN, has_few=self._has_few)
        workspace = self._workspace_for(O) if tiling.splits > 1 else None
        assert isinstance(matrix.weight_NK, Tensor)
        thin_linear(
            x_TJ, matrix.weight_NK, out_TO, bias_N=matrix.bias_N, tiling=tiling, workspace=workspace, pdl=True
        )  # fmt: skip

    def gated_product(self, x_TD: Tensor, gate_up: Matrix, out_TI: Tensor) -> None:
        if gate_up.bias_N is not None or not self._is_thin(x_TD, gate_up):
            super().gated_product(x_TD, gate_up, out_TI)
            return
        tiling = choose_tiling(len(out_TI), out_TI.shape[1], x_TD.shape[1], GATED, has_few=self._has_few)
        assert isinstance(gate_up.weight_NK, Tensor)
        thin_linear(x_TD, gate_up.weight_NK, out_TI, is_gated=True, tiling=tiling, pdl=True)

    def _is_thin(self, x_TJ: Tensor, matrix: Matrix) -> bool:
        weight, (T, J) = matrix.weight_NK, x_TJ.shape
        is_plain = isinstance(weight, Tensor) and weight.dtype == torch.bfloat16
        return is_plain and 0 < T <= self._max_thin_rows and J % 64 == 0

    def _workspace_for(self, num_outputs: int) -> SplitWorkspace:
        if num_outputs not in self._split_workspaces:
            workspace = SplitWorkspace.create(num_outputs, MAX_THIN_ROWS, _MAX_SPLITS, self._device)
            self._split_workspaces[num_outputs] = workspace
        return self._split_workspaces[num_outputs]
