"""The experts of a family's layers, and how config.json describes them: how many there are, how many a token has, and
which layers have them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from tensorweave.kernels.mixture.reference import SILU, Swiglu
from tensorweave.kernels.mixture.routing import Routing
from tensorweave.workers.models.config_fields import ConfigFields
from tensorweave.workers.models.layer_builder import LayerBuilder
from tensorweave.workers.models.mixture import ExpertNames, Mixture, MixtureBuilder
from tensorweave.workers.models.sizes import ExpertSizes

EXPERT_KEYS: Final = frozenset({"num_experts", "num_experts_per_tok", "num_local_experts", "output_router_logits"})
"""The last changes nothing of what is computed."""
SPARSE_KEYS: Final = frozenset({"decoder_sparse_step", "mlp_only_layers"})


@dataclass(frozen=True, slots=True)
class MixtureDesign:
    """The experts of a layer as its family describes them.

    Args:
        has_bias: router and experts have biases.
        shared: names of an expert for all tokens, and of its gate; None: there is none.
    """

    names: ExpertNames
    experts: ExpertSizes
    routing: Routing
    swiglu: Swiglu = SILU
    has_bias: bool = False
    shared: tuple[str, str] | None = None

    def build(self, layer: LayerBuilder) -> Mixture:
        builder = MixtureBuilder(layer, self.experts)
        routed = builder.routed_experts(self.names, self.routing, self.swiglu, has_bias=self.has_bias)
        shared = () if self.shared is None else (builder.shared_expert(*self.shared),)
        return builder.mixture(routed, *shared)


def read_experts(fields: ConfigFields, width: int, shared_width: int = 0) -> ExpertSizes:
    """The number of experts has two names: transformers 5 writes the other one for some families."""
    keys = [key for key in ("num_experts", "num_local_experts") if fields.raw.get(key) is not None]
    counts = [fields.count(key) for key in keys or ["num_experts"]]
    if len(set(counts)) > 1:
        raise fields.wrong("num_local_experts", f"the same as num_experts ({counts[0]})")
    return ExpertSizes(counts[0], width, shared_width)


def read_num_chosen(fields: ConfigFields, experts: ExpertSizes) -> int:
    key = "num_experts_per_tok"
    count = fields.count(key)
    if count > experts.num_experts:
        raise fields.wrong(key, f"at most the number of experts ({experts.num_experts})")
    return count


def read_sparse_layers(fields: ConfigFields, num_layers: int) -> Sequence[bool]:
    """Whether each layer has experts: every `decoder_sparse_step`-th, without those in `mlp_only_layers`."""
    step = fields.count("decoder_sparse_step") if fields.raw.get("decoder_sparse_step") is not None else 1
    dense = fields.raw.get("mlp_only_layers") or []
    if not isinstance(dense, list) or any(isinstance(i, bool) or not isinstance(i, int) for i in dense):
        raise fields.wrong("mlp_only_layers", "a list of layer numbers")
    return [i not in dense and (i + 1) % step == 0 for i in range(num_layers)]
