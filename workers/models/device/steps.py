"""`DecodeSteps`: makes the layers of a step of decodes for a number of rows, in the form that is fastest for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from tensorweave.kernels.device_operations import DecodeRows, DeviceOperations
from tensorweave.kernels.lora.stack import SiteStack
from tensorweave.kernels.ranks.sums import RankSums
from tensorweave.workers.models.device.buffers import StepBuffers
from tensorweave.workers.models.device.model import DeviceModel
from tensorweave.workers.models.device.products import AdaptedProducts, LayerProducts, NormedProducts, PlainProducts
from tensorweave.workers.models.device.split import SplitLayers
from tensorweave.workers.models.device.wide import AllLayers, DecodeLayerAttention, WideLayers


class DecodeSteps:
    """`caches` has the KV of each layer; `stacks` are those of the sites if rows may have adapters."""

    def __init__(
        self,
        model: DeviceModel,
        operations: DeviceOperations,
        buffers: StepBuffers,
        wide: AllLayers,
        caches: Sequence[Tensor],
        stacks: Sequence[SiteStack] = (),
    ) -> None:
        self._model = model
        self._operations = operations
        self._buffers = buffers
        self._wide = wide
        self._caches = caches
        self._make_thin = _thin_maker(model, buffers, stacks)

    def make(self, rows: DecodeRows) -> Callable[[], None]:
        """What launches all layers, from the tokens of the buffers to their logits."""
        num_rows = len(rows.slots_R)
        attend = self._operations.decode_attention(rows, self._model.num_heads, self._caches[0])
        attention = DecodeLayerAttention(attend)
        thin = self._make_thin(num_rows)
        if thin is not None:
            return lambda: thin(attention, self._caches)
        logits_RV = self._buffers.logits_RV[:num_rows]

        def run() -> None:
            hidden_RD = self._wide(num_rows, attention, self._caches)
            self._operations.product(hidden_RD, self._model.head, logits_RV)

        return run


def make_wide_layers(
    model: DeviceModel,
    operations: DeviceOperations,
    buffers: StepBuffers,
    sums: RankSums | None,
    stacks: Sequence[SiteStack],
) -> AllLayers:
    """The layers of a step of many tokens; of a model that is split over ranks, of any step.

    Args:
        sums: None: the model is whole.
        stacks: those of the sites, if tokens may have adapters.
    """
    if sums is not None:
        return SplitLayers(model, operations, sums, buffers)
    products: LayerProducts
    if stacks:
        products = AdaptedProducts(operations, stacks, model.num_heads * model.head_dim)
        return WideLayers(model, operations, buffers, products)
    if model.device.type == "cuda":
        from tensorweave.workers.models.device.wide_quantized import WideQuantizedLayers  # as in `_thin_maker`

        if WideQuantizedLayers.fits(model):
            return WideQuantizedLayers(model, buffers)
    products = PlainProducts(operations)
    if model.has_norms_behind:
        products = NormedProducts(operations, model.epsilon)
    return WideLayers(model, operations, buffers, products)


Thin = Callable[[DecodeLayerAttention, Sequence[Tensor]], None]


def _thin_maker(model: DeviceModel, buffers: StepBuffers, stacks: Sequence[SiteStack]) -> Callable[[int], Thin | None]:
    if model.device.type != "cuda" or not model.is_whole:
        return lambda num_rows: None
    from tensorweave.workers.models.device.thin import ThinLayers  # there is no Triton without a GPU
    from tensorweave.workers.models.device.thin_updates import thin_updates_maker

    if not ThinLayers.fits(model, stacks):
        return lambda num_rows: None
    workspace, max_rows = ThinLayers.make_workspace(model), ThinLayers.max_rows(model)
    make_updates = thin_updates_maker(stacks, buffers, max_rows)
    return lambda num_rows: (
        ThinLayers(model, buffers, workspace, num_rows, make_updates(num_rows)) if num_rows <= max_rows else None
    )
