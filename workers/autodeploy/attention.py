"""Paged attention inside transformers' models: the function that they call in every layer.

It is registered with transformers under the name `IMPLEMENTATION` and calls the runner that is set meanwhile: a
`Survey`, which records what layers there are, or a `PagedStep`. What would be computed wrongly is refused by name.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Final, Protocol

import torch
from torch import Tensor
from transformers import AttentionInterface

from tensorweave.kernels.attention.backend import AttentionPlan

# T tokens, N query heads, K KV heads, H head dim, C = 2 K planes of a block, B blocks, P tokens a block

IMPLEMENTATION: Final = "tensorweave_paged"
# Options that change nothing here: keys have their positions already, and there is no dropout.
_IGNORED: Final = frozenset({"dropout", "position_ids", "position_embeddings", "cache_position", "sliding_window"})


@dataclass(frozen=True, slots=True)
class Layer:
    """Attention of one layer. `window`: positions that a token attends to, its own included; None: all before it."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    window: int | None


class _Runner(Protocol):
    def attend(
        self, module: Any, query_1NTH: Tensor, key_1KTH: Tensor, value_1KTH: Tensor, mask: Any, options: dict[str, Any]
    ) -> Tensor:
        """[1, T, N, H]."""
        ...


_RUNNER: ContextVar[_Runner] = ContextVar("tensorweave_paged_runner")


def register() -> None:
    """Make `attn_implementation=IMPLEMENTATION` known to transformers. Calling it again changes nothing."""
    AttentionInterface.register(IMPLEMENTATION, _attend)


@contextlib.contextmanager
def attending(runner: _Runner) -> Iterator[None]:
    """Inside the block, models that this thread runs call `runner`."""
    token = _RUNNER.set(runner)
    try:
        yield
    finally:
        _RUNNER.reset(token)


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, **options: Any
) -> tuple[Tensor, None]:
    return _RUNNER.get().attend(module, query, key, value, attention_mask, options), None


class Survey:
    """Records every layer in a pass over one token, for which attention returns the value itself."""

    def __init__(self, model_name: str) -> None:
        self._model_name = model_name
        self._layers: dict[int, Layer] = {}

    def attend(
        self, module: Any, query_1NTH: Tensor, key_1KTH: Tensor, value_1KTH: Tensor, mask: Any, options: dict[str, Any]
    ) -> Tensor:
        index = getattr(module, "layer_idx", None)
        if not isinstance(index, int) or index in self._layers:
            raise self._refusal(f"calls attention of layer {index!r} more than once, or without a number")
        self._check_options(module, mask, options)
        N, H = query_1NTH.shape[1], query_1NTH.shape[3]
        K, value_dim = key_1KTH.shape[1], value_1KTH.shape[3]
        if value_dim != H or N % K:
            raise self._refusal(f"has {N} query heads of {H} over {K} values of {value_dim} (layer {index})")
        scale = options.get("scaling")
        self._layers[index] = Layer(N, K, H, H**-0.5 if scale is None else float(scale), options.get("sliding_window"))
        return value_1KTH.repeat_interleave(N // K, dim=1).transpose(1, 2)

    def layers(self, expected: int) -> tuple[Layer, ...]:
        """Return the layers. Raises ValueError unless all `expected` ones have attention, with KV of one shape."""
        if sorted(self._layers) != list(range(expected)):
            raise self._refusal(f"has {expected} layers, of which {len(self._layers)} have attention that can be paged")
        layers = tuple(self._layers[i] for i in range(expected))
        if len(shapes := {(layer.num_kv_heads, layer.head_dim) for layer in layers}) > 1:
            raise self._refusal(f"has layers with KV of several shapes: {sorted(shapes)}")
        return layers

    def _check_options(self, module: Any, mask: Any, options: Mapping[str, Any]) -> None:
        if mask is not None:
            raise self._refusal("makes an attention mask of its own")
        if options.get("is_causal") is False or getattr(module, "is_causal", True) is False:
            raise self._refusal("has attention that looks ahead")
        for name, value in options.items():
            is_harmless = value is None or isinstance(value, bool) or name in _IGNORED or name == "scaling"
            if not is_harmless:
                raise self._refusal(f"passes {name} to its attention, which paged attention does not compute")

    def _refusal(self, what: str) -> ValueError:
        return ValueError(f"backend '_autodeploy' cannot run {self._model_name}: it {what}")


class PagedStep:
    """One step of a packed batch: keys and values are written to their slots, queries read the cache."""

    def __init__(
        self,
        layers: Sequence[Layer],
        caches: Sequence[Tensor],
        plan: AttentionPlan,
        note_layer: Callable[[], None],
    ) -> None:
        self._layers = layers
        self._caches = caches
        self._plan = plan
        self._note_layer = note_layer

    def attend(
        self, module: Any, query_1NTH: Tensor, key_1KTH: Tensor, value_1KTH: Tensor, mask: Any, options: dict[str, Any]
    ) -> Tensor:
        layer, cache_BCPH = self._layers[module.layer_idx], self._caches[module.layer_idx]
        kv_TCH = torch.cat([key_1KTH[0], value_1KTH[0]]).transpose(0, 1).to(cache_BCPH.dtype)
        self._plan.write(kv_TCH, cache_BCPH)
        query_TNH = query_1NTH[0].transpose(0, 1).to(cache_BCPH.dtype).contiguous()
        out_TNH = self._plan.attend(query_TNH, cache_BCPH, layer.window, layer.scale)
        self._note_layer()
        return out_TNH.to(query_1NTH.dtype).unsqueeze(0)
