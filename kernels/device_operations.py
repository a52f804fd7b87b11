"""`DeviceOperations`: the table of kernels of a step that stays on a device; `choose_device_operations` chooses a form.

They write into buffers of fixed address, so that a step can be captured in a CUDA graph. The Triton forms have the
contracts; the reference forms are in torch, run anywhere, and are what the tests compare with.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from tensorweave.kernels.heads.rotation import HeadRotation
from tensorweave.kernels.lora.stack import SiteStack
from tensorweave.kernels.mixture.stack import ExpertStack
from tensorweave.kernels.step.reference import SequenceState, TableUpdate
from tensorweave.kernels.weights import Matrix

# R rows of a decode step, T tokens of any step, N query heads, K KV heads, X = N + 2 K, H head dim, D hidden size
# E experts, J inputs, O outputs, I intermediate width, B blocks of the pool, C = 2 K planes of a block
# P tokens per block, S sequence slots


class PrefillPlan(Protocol):
    """The attention of one step's prompt chunks, planned for all layers."""

    def attend(
        self, heads_TXH: Tensor, cache_BCPH: Tensor, out_TNH: Tensor, *, window: int | None, scale: float
    ) -> None:
        """Attend every chunk's rows; `heads_TXH` are rotated, and their keys and values are in the cache already.
        Other rows of `out_TNH` are not written."""
        ...


class DecodeAttention(Protocol):
    """Attention of one new token a row: see `kernels.attention.triton_decode.decode_attention`."""

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
    ) -> None: ...


@dataclass(frozen=True, slots=True)
class DecodeRows:
    """The rows of a decode step. `lengths_R` counts keys, the new token's included; 0: a padded row.

    Args:
        slots_R, lengths_R: int32.
        state: where their block tables are.
        max_length: of any sequence that the engine takes.
    """

    slots_R: Tensor
    lengths_R: Tensor
    state: SequenceState
    max_length: int


class DeviceOperations(Protocol):
    """`pdl`: a kernel may be launched while the one before still runs, where the device can."""

    def begin_step(
        self, slots_R: Tensor, given_tokens_R: Tensor, state: SequenceState, update: TableUpdate, tokens_R: Tensor
    ) -> None:
        """See `kernels.step.reference.begin_step`."""
        ...

    def embed_share(self, tokens_T: Tensor, table_VD: Tensor, first: int, out_TD: Tensor) -> None:
        """out = table[tokens - first]; zeros for tokens that are not in the table."""
        ...

    def rms_norm(self, x_TD: Tensor, weight_D: Tensor, epsilon: float, out_TD: Tensor) -> None:
        """out = x normed."""
        ...

    def gated_product(self, x_TD: Tensor, gate_up: Matrix, out_TI: Tensor) -> None:
        """silu(x gateᵀ) * (x upᵀ); the matrix's rows alternate gate and up."""
        ...

    def product(self, x_TJ: Tensor, matrix: Matrix, out_TO: Tensor) -> None:
        """out = x weightᵀ + bias. A float32 `out` gets the sums of 16-bit products unrounded, where the device can."""
        ...

    def add_product(self, x_TJ: Tensor, matrix: Matrix, sum_TO: Tensor) -> None:
        """sum += x weightᵀ + bias."""
        ...

    def add_experts(self, x_TD: Tensor, logits_TE: Tensor, stack: ExpertStack, sum_TD: Tensor) -> None:
        """See `kernels.mixture.stack.add_experts`."""
        ...

    def add_gated(self, sum_TD: Tensor, gate_T1: Tensor, x_TD: Tensor) -> None:
        """sum += sigmoid(gate) * x."""
        ...

    def silu_mul(self, gate_up_T2I: Tensor, out_TI: Tensor) -> None:
        """silu(gate) * up; columns alternate gate and up."""
        ...

    def add_updates(self, x_TJ: Tensor, places_T: Tensor, stack: SiteStack, out_TO: Tensor) -> None:
        """See `kernels.lora.stack.add_updates`."""
        ...

    def rope_store(
        self, heads_TXH: Tensor, cache_BCPH: Tensor, slots_T: Tensor, positions_T: Tensor, rotation: HeadRotation
    ) -> None:
        """Norm and rotate queries (if there are any) and keys in place; store keys and values at the KV slots (-1:
        not)."""
        ...

    def decode_attention(self, rows: DecodeRows, num_heads: int, cache_BCPH: Tensor) -> DecodeAttention:
        """Attention of these rows; `cache_BCPH` is any layer's cache."""
        ...

    def plan_prefill(self, tiles_Z4: Tensor, state: SequenceState) -> PrefillPlan:
        """Attention of a step's chunks. `tiles_Z4` is int32 on the device, see `kernels.attention.tiles`: sequences are
        slots, and tiles without rows are padding."""
        ...
