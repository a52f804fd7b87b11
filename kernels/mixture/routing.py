"""Which experts each token goes to, and with what weights, in torch."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

# T tokens, E experts, S chosen experts of a token


@dataclass(frozen=True, slots=True)
class Routing:
    """How tokens choose among a layer's experts.

    The `num_chosen` experts with the largest logits are chosen; of equal logits, the expert with the lowest number.
    transformers takes the largest of the softmax, which keeps their order; which of equal ones torch.topk returns is
    not specified.

    A weight is the softmax, in float32, over the logits of all experts; with `is_renormalized` over those of the chosen
    experts alone, which is the same as dividing the former by their sum. With `is_rounded`, weights are rounded to the
    type of the logits, as transformers' classes for Qwen and gpt-oss do; Mixtral's keeps float32.
    """

    num_chosen: int
    is_renormalized: bool
    is_rounded: bool


def route(logits_TE: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
    """The chosen experts [T, S], in ascending order, and their weights [T, S] in float32."""
    wide_TE = logits_TE.float()
    by_size_TE = wide_TE.sort(dim=-1, descending=True, stable=True).indices
    experts_TS = by_size_TE[:, : routing.num_chosen].sort(dim=-1).values
    if routing.is_renormalized:
        weights_TS = wide_TE.gather(1, experts_TS).softmax(dim=-1)
    else:
        weights_TS = wide_TE.softmax(dim=-1).gather(1, experts_TS)
    return experts_TS, weights_TS.to(logits_TE.dtype).float() if routing.is_rounded else weights_TS
