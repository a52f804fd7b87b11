"""`MoeConfig`: the part of `TorchLlmArgs` that says how mixtures of experts are computed; how ranks share experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal, Self

from pydantic import model_validator

from tensorweave.cluster.llm_args_refused import MOE, Refusal
from tensorweave.cluster.strict_model import Field, StrictBaseModel


class MoeConfig(StrictBaseModel):
    """How the experts of a mixture-of-experts model are computed."""

    refused: ClassVar[Mapping[str, Refusal]] = MOE

    backend: Literal["AUTO", "VANILLA", "CUTLASS", "CUTEDSL", "WIDEEP", "TRTLLM", "DEEPGEMM", "TRITON"] = Field(
        "AUTO",
        status="beta",
        description="'AUTO': our kernels, in C on a CPU. 'VANILLA': one expert after the other with the products of "
        "other layers, slower, to compare with. The others, TensorRT-LLM's for GPUs, are refused.",
    )

    @model_validator(mode="after")
    def _check_backend(self) -> Self:
        if self.backend not in ("AUTO", "VANILLA"):
            raise ValueError(f"backend {self.backend!r} is not part of tensorweave; use 'AUTO' (the default)")
        return self


def expert_groups(ranks: int, moe_tensor_size: int | None, moe_expert_size: int | None) -> int:
    """The groups of ranks that have different experts. Where one of the sizes is not given it follows from the other;
    where neither is, all ranks share each expert.

    Raises:
        ValueError: the product of the sizes is not `ranks`.
    """
    if moe_tensor_size is None:
        if moe_expert_size is None:
            return 1
        tensor, expert = ranks // moe_expert_size, moe_expert_size
    else:
        tensor, expert = moe_tensor_size, ranks // moe_tensor_size if moe_expert_size is None else moe_expert_size
    if tensor * expert != ranks:
        raise ValueError(
            f"moe_tensor_parallel_size is {moe_tensor_size} and moe_expert_parallel_size {moe_expert_size}; their "
            f"product must be tensor_parallel_size ({ranks})"
        )
    return expert
