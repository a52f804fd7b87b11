"""`StepSettings`: what `TorchLlmArgs` leaves to the device: how large a step is, and whether steps overlap.

Called where an executor or an engine is built, once the device is known.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Self

from tensorweave.cluster.llm_args import TorchLlmArgs

_GPU_LIMITS: Final = (512, 8192)
_CPU_LIMITS: Final = (256, 2048)
_GPU_BESIDE_DECODES: Final = 2048
"""45 ms of an 8B model on an H100; it computes larger steps at the same rate."""
_MOST_DRAFTED: Final = 256
"""Draft tokens of one step: each has a row of logits, of 0.2 to 0.6 MB."""


@dataclass(frozen=True, slots=True)
class StepSettings:
    """At most `max_batch_size` requests and `max_num_tokens` tokens in one step, of which at most
    `max_prompt_tokens_beside_decodes` are prompts' where requests decode: as many as there are, or, with
    `balances_prompts`, as many as suit what waits and what runs. At most `max_drafted` are drafted.
    `overlaps`: a step is launched before the one before it has settled."""

    max_batch_size: int
    max_num_tokens: int
    max_prompt_tokens_beside_decodes: int
    balances_prompts: bool
    overlaps: bool
    max_drafted: int = 0

    @property
    def max_samples(self) -> int:
        """Most tokens of a step that have logits."""
        return self.max_batch_size + self.max_drafted

    @classmethod
    def of(cls, args: TorchLlmArgs, device_type: str) -> Self:
        """`device_type` is torch's name of the device that computes: 'cuda' or 'cpu'. On a CPU a step is computed as it
        is launched, so that nothing is gained by overlapping."""
        is_gpu = device_type == "cuda"
        max_batch_size, max_num_tokens = _GPU_LIMITS if is_gpu else _CPU_LIMITS
        disabled = args.disable_overlap_scheduler
        max_num_tokens = args.max_num_tokens or max_num_tokens
        max_batch_size, drafts = args.max_batch_size or max_batch_size, args.speculative_config
        most_beside = min(max_num_tokens, _GPU_BESIDE_DECODES) if is_gpu else max_num_tokens
        given_beside = args.scheduler_config.max_prompt_tokens_beside_decodes
        return cls(
            max_batch_size=max_batch_size,
            max_num_tokens=max_num_tokens,
            max_prompt_tokens_beside_decodes=given_beside or most_beside,
            balances_prompts=is_gpu and given_beside is None,
            overlaps=args.speculative_config is None and (is_gpu if disabled is None else not disabled),
            max_drafted=0 if drafts is None else min(max_batch_size * drafts.max_draft_len, _MOST_DRAFTED),
        )
