"""`ReferenceOperations`: a step's kernels in torch, on any device: what the fast forms are tested against, and what a
device engine runs on where there is no GPU."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tensorweave.kernels.device_operations import DecodeAttention, DecodeRows, PrefillPlan
from tensorweave.kernels.heads.kv_slots import KvSlots
from tensorweave.kernels.heads.reference import HeadNorms, place_heads
from tensorweave.kernels.heads.rotation import HeadRotation
from tensorweave.kernels.linear.reference import DequantizedLinear, Linear, make_linear
from tensorweave.kernels.lora.stack import SiteStack, add_updates
from tensorweave.kernels.mixture.gated_sum import add_gated
from tensorweave.kernels.mixture.stack import ExpertStack, add_experts
from tensorweave.kernels.norm.reference import rms_norm
from tensorweave.kernels.step import reference as step
from tensorweave.kernels.step.reference import SequenceState, TableUpdate
from tensorweave.kernels.weights import Matrix, PackedCodes

# R rows of a decode step, T tokens of any step, N query heads, K KV heads, X = N + 2 K, H head dim, D hidden size
# I intermediate width, B blocks of the pool, C = 2 K planes of a block, P tokens per block, S sequence slots, L keys


class ReferenceOperations:
    """See `DeviceOperations`."""

    def begin_step(
        self, slots_R: Tensor, given_tokens_R: Tensor, state: SequenceState, update: TableUpdate, tokens_R: Tensor
    ) -> None:
        step.begin_step(slots_R, given_tokens_R, state, update, tokens_R)

    def embed_share(self, tokens_T: Tensor, table_VD: Tensor, first: int, out_TD: Tensor) -> None:
        local_T = tokens_T.long() - first
        is_other_T = (local_T < 0) | (local_T >= len(table_VD))
        out_TD.copy_(F.embedding(local_T.masked_fill(is_other_T, 0), table_VD))
        out_TD.masked_fill_(is_other_T.unsqueeze(1), 0)

    def rms_norm(self, x_TD: Tensor, weight_D: Tensor, epsilon: float, out_TD: Tensor) -> None:
        out_TD.copy_(rms_norm(x_TD, weight_D, epsilon))

    def gated_product(self, x_TD: Tensor, gate_up: Matrix, out_TI: Tensor) -> None:
        self.silu_mul(_linear(gate_up)(x_TD), out_TI)

    def product(self, x_TJ: Tensor, matrix: Matrix, out_TO: Tensor) -> None:
        linear = _linear(matrix)
        out_TO.copy_(linear.to_float32(x_TJ) if out_TO.dtype == torch.float32 else linear(x_TJ))

    def add_product(self, x_TJ: Tensor, matrix: Matrix, sum_TO: Tensor) -> None:
        sum_TO += _linear(matrix)(x_TJ)

    def add_experts(self, x_TD: Tensor, logits_TE: Tensor, stack: ExpertStack, sum_TD: Tensor) -> None:
        add_experts(x_TD, logits_TE, stack, sum_TD)

    def add_gated(self, sum_TD: Tensor, gate_T1: Tensor, x_TD: Tensor) -> None:
        add_gated(sum_TD, gate_T1, x_TD)

    def silu_mul(self, gate_up_T2I: Tensor, out_TI: Tensor) -> None:
        torch.mul(F.silu(gate_up_T2I[:, 0::2]), gate_up_T2I[:, 1::2], out=out_TI)

    def add_updates(self, x_TJ: Tensor, places_T: Tensor, stack: SiteStack, out_TO: Tensor) -> None:
        add_updates(x_TJ, places_T, stack, out_TO)

    def rope_store(
        self, heads_TXH: Tensor, cache_BCPH: Tensor, slots_T: Tensor, positions_T: Tensor, rotation: HeadRotation
    ) -> None:
        _, C, P, _ = cache_BCPH.shape
        is_stored = slots_T >= 0
        placed = heads_TXH[is_stored]
        table_TH = rotation.table_LH.index_select(0, positions_T[is_stored].long())
        place_heads(placed, table_TH, cache_BCPH, KvSlots(slots_T[is_stored].long(), C, P), _norms(rotation))
        num_queries = heads_TXH.shape[1] - C
        heads_TXH[is_stored, :num_queries] = placed[:, :num_queries]

    def decode_attention(self, rows: DecodeRows, num_heads: int, cache_BCPH: Tensor) -> DecodeAttention:
        return ReferenceDecodeAttention(self, rows)

    def plan_prefill(self, tiles_Z4: Tensor, state: SequenceState) -> PrefillPlan:
        return ReferencePrefillPlan(tiles_Z4, state)


@dataclass(frozen=True, slots=True)
class ReferenceDecodeAttention:
    operations: ReferenceOperations
    rows: DecodeRows

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
        assert peaks_RA is None, "peaks are for products on a GPU"
        rows, N, P = self.rows, out_RNH.shape[1], cache_BCPH.shape[2]
        tables_RW = rows.state.tables_SW.index_select(0, rows.slots_R.long())
        last_R = rows.lengths_R.long() - 1
        if rotation is not None:
            block_R = tables_RW.gather(1, (last_R.clamp_min(0) // P).unsqueeze(1)).squeeze(1)
            slots_R = torch.where(last_R < 0, -1, block_R * P + last_R % P)
            self.operations.rope_store(heads_RXH, cache_BCPH, slots_R, last_R.clamp_min(0), rotation)
        for row, length in enumerate(rows.lengths_R.tolist()):
            if length == 0:
                out_RNH[row] = 0
                continue
            _attend(heads_RXH[row : row + 1, :N], tables_RW[row], length - 1, cache_BCPH, window, scale, out_RNH[row])


@dataclass(frozen=True, slots=True)
class ReferencePrefillPlan:
    tiles_Z4: Tensor
    state: SequenceState

    def attend(
        self, heads_TXH: Tensor, cache_BCPH: Tensor, out_TNH: Tensor, *, window: int | None, scale: float
    ) -> None:
        N = out_TNH.shape[1]
        for first_row, position, num_rows, slot in self.tiles_Z4.tolist():
            rows = slice(first_row, first_row + num_rows)
            if num_rows:
                table_W = self.state.tables_SW[slot]
                _attend(heads_TXH[rows, :N], table_W, position, cache_BCPH, window, scale, out_TNH[rows])


def _linear(matrix: Matrix) -> Linear:
    weight = matrix.weight_NK
    if isinstance(weight, PackedCodes):
        return DequantizedLinear(weight, matrix.bias_N)
    return make_linear(weight, matrix.bias_N)


def _attend(
    q_TNH: Tensor, table_W: Tensor, start: int, cache_BCPH: Tensor, window: int | None, scale: float, out: Tensor
) -> None:
    """Attention of tokens [start, start + T) of the sequence in these blocks, causal and within the window."""
    T, N, H = q_TNH.shape
    K, P = cache_BCPH.shape[1] // 2, cache_BCPH.shape[2]
    L = start + T
    first = 0 if window is None else max(0, start - window + 1)
    blocks = table_W[first // P : -(-L // P)].long()
    kv_CLH = cache_BCPH[blocks].transpose(0, 1).flatten(1, 2)
    keys_L = torch.arange(first // P * P, first // P * P + kv_CLH.shape[1], device=q_TNH.device)
    kv_CLH, keys_L = kv_CLH[:, (keys_L >= first) & (keys_L < L)], keys_L[(keys_L >= first) & (keys_L < L)]
    distance_TL = torch.arange(start, L, device=q_TNH.device).unsqueeze(1) - keys_L
    seen_TL = (distance_TL >= 0) & (distance_TL < (window or L))
    k_NLH, v_NLH = kv_CLH.to(q_TNH.dtype).view(2, K, -1, H).repeat_interleave(N // K, 1)
    attended = F.scaled_dot_product_attention(q_TNH.transpose(0, 1), k_NLH, v_NLH, attn_mask=seen_TL, scale=scale)
    out.view(T, N, H).copy_(attended.transpose(0, 1))


def _norms(rotation: HeadRotation) -> HeadNorms | None:
    if rotation.query_norm_H is None or rotation.key_norm_H is None:
        return None
    return HeadNorms(rotation.query_norm_H, rotation.key_norm_H, rotation.epsilon)
