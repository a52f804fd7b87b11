"""`LayerProducts`: the matrix products of a layer of `WideLayers`, plain or with what adapters add."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from tensorweave.kernels.device_operations import DeviceOperations
from tensorweave.kernels.lora.stack import SiteStack
from tensorweave.kernels.weights import Matrix
from tensorweave.workers.models.device.buffers import LayerBuffers
from tensorweave.workers.models.device.mlp import DeviceMlp
from tensorweave.workers.models.device.model import DeviceLayer

# T tokens, O outputs, R rows that sample, I intermediate width


class LayerProducts(Protocol):
    def heads(self, layer: DeviceLayer, part: LayerBuffers) -> None:
        """Queries, keys and values of what is normed."""
        ...

    def keys_and_values(self, layer: DeviceLayer, matrix: Matrix, part: LayerBuffers, out_TO: Tensor) -> None:
        """Without the queries; `matrix` has the rest of the layer's."""
        ...

    def add_attended(self, layer: DeviceLayer, part: LayerBuffers) -> None: ...

    def add_mlp(self, layer: DeviceLayer, mlp: DeviceMlp, part: LayerBuffers) -> None: ...

    def choose_rows(self, part: LayerBuffers, rows_R: Tensor, sampled: LayerBuffers) -> None:
        """Beside the residual, what a layer of these rows alone reads."""
        ...


@dataclass(frozen=True, slots=True)
class PlainProducts:
    operations: DeviceOperations

    def heads(self, layer: DeviceLayer, part: LayerBuffers) -> None:
        self.operations.product(part.normed_TD, layer.qkv, part.heads_TXH.flatten(1))

    def keys_and_values(self, layer: DeviceLayer, matrix: Matrix, part: LayerBuffers, out_TO: Tensor) -> None:
        self.operations.product(part.normed_TD, matrix, out_TO)

    def add_attended(self, layer: DeviceLayer, part: LayerBuffers) -> None:
        self.operations.add_product(part.attended_TNH.flatten(1), layer.output, part.x_TD)

    def add_mlp(self, layer: DeviceLayer, mlp: DeviceMlp, part: LayerBuffers) -> None:
        self.operations.gated_product(part.normed_TD, mlp.gate_up, part.gated_TI)
        self.operations.add_product(part.gated_TI, mlp.down, part.x_TD)

    def choose_rows(self, part: LayerBuffers, rows_R: Tensor, sampled: LayerBuffers) -> None:
        return None


@dataclass(frozen=True, slots=True)
class NormedProducts:
    """Where what attention and MLP return is normed before it is added."""

    operations: DeviceOperations
    epsilon: float

    def heads(self, layer: DeviceLayer, part: LayerBuffers) -> None:
        self.operations.product(part.normed_TD, layer.qkv, part.heads_TXH.flatten(1))

    def keys_and_values(self, layer: DeviceLayer, matrix: Matrix, part: LayerBuffers, out_TO: Tensor) -> None:
        self.operations.product(part.normed_TD, matrix, out_TO)

    def add_attended(self, layer: DeviceLayer, part: LayerBuffers) -> None:
        self._add(part.attended_TNH.flatten(1), layer.output, layer.after_attention_norm_D, part.x_TD)

    def add_mlp(self, layer: DeviceLayer, mlp: DeviceMlp, part: LayerBuffers) -> None:
        self.operations.gated_product(part.normed_TD, mlp.gate_up, part.gated_TI)
        self._add(part.gated_TI, mlp.down, layer.after_mlp_norm_D, part.x_TD)

    def choose_rows(self, part: LayerBuffers, rows_R: Tensor, sampled: LayerBuffers) -> None:
        return None

    def _add(self, x_TJ: Tensor, matrix: Matrix, norm_D: Tensor | None, sum_TD: Tensor) -> None:
        assert norm_D is not None
        update_TD, normed_TD = torch.empty_like(sum_TD), torch.empty_like(sum_TD)
        self.operations.product(x_TJ, matrix, update_TD)
        self.operations.rms_norm(update_TD, norm_D, self.epsilon, normed_TD)
        sum_TD += normed_TD


@dataclass(frozen=True, slots=True)
class AdaptedProducts:
    """`stacks` by the number of a site."""

    operations: DeviceOperations
    stacks: Sequence[SiteStack]
    num_queries: int

    def heads(self, layer: DeviceLayer, part: LayerBuffers) -> None:
        assert layer.sites is not None
        heads_TO = part.heads_TXH.flatten(1)
        self.operations.product(part.normed_TD, layer.qkv, heads_TO)
        self._add(part.normed_TD, part, self.stacks[layer.sites.qkv], heads_TO)

    def keys_and_values(self, layer: DeviceLayer, matrix: Matrix, part: LayerBuffers, out_TO: Tensor) -> None:
        assert layer.sites is not None
        self.operations.product(part.normed_TD, matrix, out_TO)
        self._add(part.normed_TD, part, self.stacks[layer.sites.qkv].outputs_from(self.num_queries), out_TO)

    def add_attended(self, layer: DeviceLayer, part: LayerBuffers) -> None:
        assert layer.sites is not None
        attended = part.attended_TNH.flatten(1)
        self.operations.add_product(attended, layer.output, part.x_TD)
        self._add(attended, part, self.stacks[layer.sites.output], part.x_TD)

    def add_mlp(self, layer: DeviceLayer, mlp: DeviceMlp, part: LayerBuffers) -> None:
        assert layer.sites is not None
        gate_up_T2I = part.x_TD.new_empty(len(part.x_TD), mlp.gate_up.num_outputs)
        self.operations.product(part.normed_TD, mlp.gate_up, gate_up_T2I)
        self._add(part.normed_TD, part, self.stacks[layer.sites.gate_up], gate_up_T2I)
        self.operations.silu_mul(gate_up_T2I, part.gated_TI)
        self.operations.add_product(part.gated_TI, mlp.down, part.x_TD)
        self._add(part.gated_TI, part, self.stacks[layer.sites.down], part.x_TD)

    def choose_rows(self, part: LayerBuffers, rows_R: Tensor, sampled: LayerBuffers) -> None:
        torch.index_select(part.places_T, 0, rows_R, out=sampled.places_T)

    def _add(self, x_TJ: Tensor, part: LayerBuffers, stack: SiteStack, out_TO: Tensor) -> None:
        self.operations.add_updates(x_TJ, part.places_T, stack, out_TO)
