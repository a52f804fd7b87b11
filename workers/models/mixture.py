"""`Mixture`: the MLP of a layer that sends each token to a few of many experts.

The ranks of a gang divide the experts into `mesh.expert` groups of `mesh.moe_tensor` ranks, which share each expert of
their group. Every rank routes all tokens, and adds what its share of the experts contributes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from tensorweave.cluster.mesh import MeshRank
from tensorweave.kernels.linear.reference import Linear
from tensorweave.kernels.mixture.reference import SILU, Expert, ExpertGroup, Experts, Swiglu
from tensorweave.kernels.mixture.routing import Routing
from tensorweave.kernels.operations import AddGated
from tensorweave.workers.gang.comm import Comm, SoloComm
from tensorweave.workers.models.adapter_sites import column_site
from tensorweave.workers.models.decoder_layer import GatedMlp
from tensorweave.workers.models.forward_inputs import ForwardInputs
from tensorweave.workers.models.layer_builder import LayerBuilder, LinearRows
from tensorweave.workers.models.layers import ColumnForm
from tensorweave.workers.models.rank_weights import TensorRows
from tensorweave.workers.models.shards import split_evenly
from tensorweave.workers.models.sizes import ExpertSizes

# T tokens, D hidden size, E experts


@dataclass(frozen=True, slots=True)
class RoutedExperts:
    router: Linear
    experts: Experts

    def __call__(self, x_TD: Tensor) -> Tensor:
        """This rank's part of the sum, a new tensor [T, D]."""
        return self.experts(x_TD, self.router(x_TD))


@dataclass(frozen=True, slots=True)
class SharedExpert:
    """An MLP for all tokens, times the sigmoid of a number of each token's own. Its `mlp` exchanges nothing."""

    mlp: GatedMlp
    gate: ColumnForm
    add_gated: AddGated

    def add_to(self, out_TD: Tensor, x_TD: Tensor, inputs: ForwardInputs) -> None:
        """Add this rank's part."""
        self.add_gated(out_TD, self.gate(x_TD, inputs), self.mlp(x_TD, inputs))


@dataclass(frozen=True, slots=True)
class Mixture:
    """The sum over its experts and over ranks."""

    routed: RoutedExperts
    shared: tuple[SharedExpert, ...]
    comm: Comm

    def __call__(self, x_TD: Tensor, inputs: ForwardInputs) -> Tensor:
        out_TD = self.routed(x_TD)
        for expert in self.shared:
            expert.add_to(out_TD, x_TD, inputs)
        return self.comm.all_reduce(out_TD)


@dataclass(frozen=True, slots=True)
class ExpertNames:
    """Names of a layer's tensors without '.weight' and '.bias'; '{}' stands for the number of an expert."""

    router: str
    gate: str
    up: str
    down: str


@dataclass(frozen=True, slots=True)
class MixtureBuilder:
    """Builds what is not a part of every layer from what `layer` reads."""

    layer: LayerBuilder
    sizes: ExpertSizes

    def mixture(self, routed: RoutedExperts, *shared: SharedExpert) -> Mixture:
        return Mixture(routed, shared, self.layer.comm)

    def routed_experts(
        self, names: ExpertNames, routing: Routing, swiglu: Swiglu = SILU, *, has_bias: bool = False
    ) -> RoutedExperts:
        """`has_bias`: router and experts have biases."""
        here = split_evenly(self.sizes.num_experts, self.layer.place.mesh.expert)[self.layer.place.expert]
        group = ExpertGroup(
            experts=tuple(self._expert(names, number, has_bias=has_bias) for number in here),
            first=here.start,
            num_experts=self.sizes.num_experts,
            routing=routing,
            swiglu=swiglu,
        )
        router = self._whole(names.router, self.sizes.num_experts, has_bias=has_bias)
        return RoutedExperts(router, self.layer.operations.make_experts(group))

    def shared_expert(self, name: str, gate_name: str) -> SharedExpert:
        """An expert with gate_proj, up_proj and down_proj, as a layer's plain MLP has."""
        width, rows = self.sizes.shared_width, self.layer.share(self.sizes.shared_width)
        partial = replace(self.layer, comm=SoloComm())
        parts = [LinearRows(f"{name}.{part}_proj", width, rows) for part in ("gate", "up")]
        mlp = GatedMlp(
            gate_up=partial.column_linear(parts, has_bias=False),
            activate=self.layer.operations.silu_mul,
            down=partial.row_linear(f"{name}.down_proj", width, rows, has_bias=False),
        )
        site = column_site([(f"{self.layer.prefix}.{gate_name}", 1, range(1))], self.layer.sizes.hidden_size)
        gate = self.layer.linears.column(self._whole(gate_name, 1, has_bias=False), site)
        return SharedExpert(mlp, gate, self.layer.operations.add_gated)

    def _expert(self, names: ExpertNames, number: int, *, has_bias: bool) -> Expert:
        layer, width, hidden = self.layer, self.sizes.width, self.layer.sizes.hidden_size
        rows = _share_of_expert(width, layer.place)
        gate_up = [f"{layer.prefix}.{name.format(number)}" for name in (names.gate, names.up)]
        down = f"{layer.prefix}.{names.down.format(number)}"
        keeps_bias = has_bias and layer.place.moe_tensor == 0
        return Expert(
            gate_up=layer.operations.make_linear(
                layer.weights.matrix_rows([TensorRows(f"{name}.weight", (width, hidden), rows) for name in gate_up]),
                layer.weights.rows([TensorRows(f"{name}.bias", (width,), rows) for name in gate_up])
                if has_bias
                else None,
            ),
            down=layer.operations.make_linear(
                layer.weights.matrix_columns(f"{down}.weight", (hidden, width), rows),
                layer.weights.vector(f"{down}.bias", hidden) if keeps_bias else None,
            ),
        )

    def _whole(self, name: str, num_outputs: int, *, has_bias: bool) -> Linear:
        """A matrix that every rank has. It is read as it is: what is decided by it is not to be quantized."""
        layer = self.layer
        rows, hidden = range(num_outputs), layer.sizes.hidden_size
        weight = layer.weights.rows([TensorRows(f"{layer.prefix}.{name}.weight", (num_outputs, hidden), rows)])
        bias = layer.weights.vector(f"{layer.prefix}.{name}.bias", num_outputs) if has_bias else None
        return layer.operations.make_linear(weight, bias)


def _share_of_expert(width: int, place: MeshRank) -> range:
    """This rank's part of an expert, where possible in whole groups of 32 inputs, as quantized weights are in, else in
    pairs."""
    parts = place.mesh.moe_tensor
    unit = next(unit for unit in (32, 2, 1) if width % unit == 0 and (width // unit >= parts or unit == 1))
    share = split_evenly(width // unit, parts)[place.moe_tensor]
    return range(share.start * unit, share.stop * unit)
