"""`TritonOperations`: a step's kernels on a GPU. `choose_device_operations` makes them; this module needs Triton."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from tensorweave.kernels.attention import cuda_decode, cuda_prefill, triton_prefill
from tensorweave.kernels.attention.triton_decode import DecodeWorkspace, choose_splits, decode_attention
from tensorweave.kernels.device_operations import DecodeAttention, DecodeRows, PrefillPlan
from tensorweave.kernels.heads.rotation import HeadRotation
from tensorweave.kernels.heads.triton import rope_store
from tensorweave.kernels.linear import cuda_grouped, cuda_wide
from tensorweave.kernels.linear.cuda_grouped import grouped_linear
from tensorweave.kernels.linear.cuda_wide import choose_wide_tiling, wide_gated_linear
from tensorweave.kernels.linear.quantized import QuantizedRows, can_scale, scaled_linear
from tensorweave.kernels.linear.reference import QuantizedLinear
from tensorweave.kernels.linear.triton_quantize import quantize
from tensorweave.kernels.linear.triton_swiglu import silu_mul_pairs, swiglu_linear
from tensorweave.kernels.lora.stack import SiteStack
from tensorweave.kernels.lora.triton import add_updates
from tensorweave.kernels.mixture.gated_sum import add_gated
from tensorweave.kernels.mixture.stack import ExpertStack
from tensorweave.kernels.mixture.triton import add_experts, choose_tilings
from tensorweave.kernels.norm.triton import add_rms_norm, embed_share
from tensorweave.kernels.step import triton as step
from tensorweave.kernels.step.reference import SequenceState, TableUpdate
from tensorweave.kernels.weights import Matrix, PackedCodes, QuantizedWeight

_TYPICAL_LENGTH: Final = 2048
"""For how many keys a row's attention is split where the lengths are not known yet."""
_WORKSPACE_ROWS: Final = 512
_SWIGLU_ROWS: Final = 2048
"""From here on the activation is cheaper in the product's epilogue (benchmarks/gpu_kernels.md)."""


class TritonOperations:
    """See `DeviceOperations`. One for all steps of an engine, whose kernels run in the order of one stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._has_pdl = torch.cuda.get_device_capability(device) >= (9, 0)
        self._workspaces: dict[tuple[int, ...], DecodeWorkspace] = {}

    def begin_step(
        self, slots_R: Tensor, given_tokens_R: Tensor, state: SequenceState, update: TableUpdate, tokens_R: Tensor
    ) -> None:
        step.begin_step(slots_R, given_tokens_R, state, update, tokens_R)

    def embed_share(self, tokens_T: Tensor, table_VD: Tensor, first: int, out_TD: Tensor) -> None:
        embed_share(tokens_T, table_VD, first, out_TD, pdl=self._has_pdl)

    def rms_norm(self, x_TD: Tensor, weight_D: Tensor, epsilon: float, out_TD: Tensor) -> None:
        add_rms_norm(x_TD, None, weight_D, epsilon, out_TD, pdl=self._has_pdl)

    def gated_product(self, x_TD: Tensor, gate_up: Matrix, out_TI: Tensor) -> None:
        weight = gate_up.weight_NK
        if isinstance(weight, PackedCodes):
            if gate_up.bias_N is None and _is_few(x_TD, weight):
                grouped_linear(x_TD, weight, out_TI, is_gated=True, pdl=self._has_pdl)
            else:
                self.gated_product(x_TD, Matrix(_dequantized(weight), gate_up.bias_N), out_TI)
            return
        if isinstance(weight, QuantizedWeight):
            gate_up_T2I = torch.empty(len(x_TD), 2 * out_TI.shape[1], dtype=x_TD.dtype, device=x_TD.device)
            self._quantized_product(x_TD, weight, gate_up.bias_N, gate_up_T2I)
            silu_mul_pairs(gate_up_T2I, out_TI, pdl=self._has_pdl)
            return
        assert isinstance(weight, Tensor)
        is_wide = len(x_TD) >= _SWIGLU_ROWS and self._has_pdl  # Hopper's copy engine reads its tiles
        tiling = choose_wide_tiling(len(x_TD))
        if is_wide and x_TD.dtype == torch.bfloat16 and gate_up.bias_N is None:
            swiglu_linear(x_TD, weight, out_TI)
        elif tiling is not None and gate_up.bias_N is None and cuda_wide.fits(x_TD, weight):
            wide_gated_linear(x_TD, weight, out_TI, tiling, pdl=True)
        else:
            silu_mul_pairs(F.linear(x_TD, weight, gate_up.bias_N), out_TI, pdl=self._has_pdl)

    def product(self, x_TJ: Tensor, matrix: Matrix, out_TO: Tensor) -> None:
        weight = matrix.weight_NK
        if isinstance(weight, PackedCodes):
            if _is_few(x_TJ, weight):
                grouped_linear(x_TJ, weight, out_TO, bias_N=matrix.bias_N, pdl=self._has_pdl)
            else:
                self.product(x_TJ, Matrix(_dequantized(weight), matrix.bias_N), out_TO)
            return
        if isinstance(weight, QuantizedWeight):
            self._quantized_product(x_TJ, weight, matrix.bias_N, out_TO)
            return
        assert isinstance(weight, Tensor)
        if matrix.bias_N is not None:
            torch.addmm(matrix.bias_N, x_TJ, weight.T, out=out_TO)
        elif out_TO.dtype != x_TJ.dtype:
            torch.mm(x_TJ, weight.T, out_dtype=out_TO.dtype, out=out_TO)
        else:
            torch.mm(x_TJ, weight.T, out=out_TO)

    def add_product(self, x_TJ: Tensor, matrix: Matrix, sum_TO: Tensor) -> None:
        weight = matrix.weight_NK
        if isinstance(weight, PackedCodes):
            if _is_few(x_TJ, weight):
                update_TO = torch.empty_like(sum_TO)
                self.product(x_TJ, matrix, update_TO)
                sum_TO += update_TO
            else:
                self.add_product(x_TJ, Matrix(_dequantized(weight), matrix.bias_N), sum_TO)
            return
        if isinstance(weight, QuantizedWeight):
            update_TO = torch.empty_like(sum_TO)
            self._quantized_product(x_TJ, weight, matrix.bias_N, update_TO)
            sum_TO += update_TO
            return
        assert isinstance(weight, Tensor)
        torch.addmm(sum_TO, x_TJ, weight.T, out=sum_TO)
        if matrix.bias_N is not None:
            sum_TO += matrix.bias_N

    def _quantized_product(self, x_TJ: Tensor, weight: QuantizedWeight, bias_O: Tensor | None, out_TO: Tensor) -> None:
        """In a kernel of its own: `WideQuantizedLayers` has what is quantized on the way."""
        if not can_scale(weight):
            out_TO.copy_(QuantizedLinear(weight, bias_O)(x_TJ))
            return
        rows = QuantizedRows.empty(x_TJ.shape[0], x_TJ.shape[1], self._device)
        quantize(x_TJ, rows, pdl=self._has_pdl)
        scaled_linear(rows, weight, out_TO, bias_O)

    def add_experts(self, x_TD: Tensor, logits_TE: Tensor, stack: ExpertStack, sum_TD: Tensor) -> None:
        tilings = choose_tilings(len(x_TD), stack, is_scaled=False)
        add_experts(x_TD, logits_TE, stack, sum_TD, tilings, pdl=self._has_pdl)

    def add_gated(self, sum_TD: Tensor, gate_T1: Tensor, x_TD: Tensor) -> None:
        add_gated(sum_TD, gate_T1, x_TD)

    def silu_mul(self, gate_up_T2I: Tensor, out_TI: Tensor) -> None:
        silu_mul_pairs(gate_up_T2I, out_TI, pdl=self._has_pdl)

    def add_updates(self, x_TJ: Tensor, places_T: Tensor, stack: SiteStack, out_TO: Tensor) -> None:
        add_updates(x_TJ, places_T, stack, out_TO, pdl=self._has_pdl)

    def rope_store(
        self, heads_TXH: Tensor, cache_BCPH: Tensor, slots_T: Tensor, positions_T: Tensor, rotation: HeadRotation
    ) -> None:
        rope_store(
            heads_TXH, cache_BCPH, slots_T, positions_T, rotation.table_LH, query_norm_H=rotation.query_norm_H,
            key_norm_H=rotation.key_norm_H, epsilon=rotation.epsilon, pdl=self._has_pdl,
        )  # fmt: skip

    def decode_attention(self, rows: DecodeRows, num_heads: int, cache_BCPH: Tensor) -> DecodeAttention:
        R, K, H = len(rows.slots_R), cache_BCPH.shape[1] // 2, cache_BCPH.shape[3]
        num_splits = choose_splits(R, K, min(rows.max_length, _TYPICAL_LENGTH))
        workspace = self._workspace(max(R, _WORKSPACE_ROWS), num_heads, K, H)
        if num_splits > 1 and R * num_splits > max(R, _WORKSPACE_ROWS):
            workspace = DecodeWorkspace.create(R, num_heads, K, H, num_splits, self._device)
        return TritonDecodeAttention(rows, workspace, num_splits, self._has_pdl)

    def _workspace(self, num_rows: int, num_heads: int, num_kv_heads: int, head_dim: int) -> DecodeWorkspace:
        sizes = (num_rows, num_heads, num_kv_heads, head_dim)
        if sizes not in self._workspaces:
            self._workspaces[sizes] = DecodeWorkspace.create(*sizes, 1, self._device)
        return self._workspaces[sizes]

    def plan_prefill(self, tiles_Z4: Tensor, state: SequenceState) -> PrefillPlan:
        return TritonPrefillPlan(state.tables_SW, tiles_Z4)


def _is_few(x_TJ: Tensor, weight: PackedCodes) -> bool:
    return len(x_TJ) <= cuda_grouped.MOST_ROWS and cuda_grouped.fits(weight)


def _dequantized(weight: PackedCodes) -> Tensor:
    return cuda_grouped.dequantize(weight) if cuda_grouped.fits(weight) else weight.rows()


@dataclass(frozen=True, slots=True)
class TritonDecodeAttention:
    rows: DecodeRows
    workspace: DecodeWorkspace
    num_splits: int
    pdl: bool

    def __call__(
        self,
        heads_RXH: Tensor,
        cache_BCPH: Tensor,
        out_RNH: Tensor,
        *,
        window: int | None,
        scale: float,
        rotation: HeadRotation | None,
        peaks_RA: Tensor | None = None,
    ) -> None:
        is_whole = self.num_splits == 1 and rotation is not None
        if is_whole and cuda_decode.fits(heads_RXH, cache_BCPH, out_RNH.shape[1]):
            cuda_decode.decode_attention(
                heads_RXH, cache_BCPH, self.rows.state.tables_SW, self.rows.lengths_R, out_RNH, scale=scale,
                rotation=rotation, window=window, slots_R=self.rows.slots_R, peaks_RA=peaks_RA, pdl=self.pdl,
            )  # fmt: skip
            return
        decode_attention(
            heads_RXH, cache_BCPH, self.rows.state.tables_SW, self.rows.lengths_R, out_RNH, self.workspace,
            scale=scale, num_splits=self.num_splits, rotation=rotation, window=window, slots_R=self.rows.slots_R,
            peaks_RA=peaks_RA, pdl=self.pdl,
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class TritonPrefillPlan:
    tables_SW: Tensor
    tiles_Z4: Tensor

    def attend(
        self, heads_TXH: Tensor, cache_BCPH: Tensor, out_TNH: Tensor, *, window: int | None, scale: float
    ) -> None:
        q_TNH = heads_TXH[:, : out_TNH.shape[1]]
        is_hopper = cuda_prefill.fits(q_TNH, cache_BCPH)
        attend = cuda_prefill.prefill_attention if is_hopper else triton_prefill.prefill_attention
        attend(q_TNH, cache_BCPH, self.tables_SW, self.tiles_Z4, out_TNH, scale=scale, window=window)
