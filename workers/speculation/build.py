"""Builds what an executor needs for a `speculative_config`, or the Null object where there is none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from tensorweave.cluster.speculation_config import (
    NGramDecodingConfig,
    SpeculativeConfig,
    UserProvidedDecodingConfig,
)
from tensorweave.workers.gang.comm import Comm
from tensorweave.workers.sampling.decoder import Decoder
from tensorweave.workers.sampling.verifying_decoder import VerifyingDecoder
from tensorweave.workers.speculation.drafter import Drafter
from tensorweave.workers.speculation.ngram import NGramDrafter
from tensorweave.workers.speculation.pace import CPU_FREE_ROWS, GPU_FREE_ROWS, DraftPace
from tensorweave.workers.speculation.public_patterns import PublicPatterns
from tensorweave.workers.speculation.speculation import AcceptanceWindow, DraftedSpeculation, DraftLimits
from tensorweave.workers.speculation.user_drafter import UserDrafter
from tensorweave.workers.step.resources import BaseResourceManager, KVCache
from tensorweave.workers.step.speculation import NoSpeculation, Speculation

MakeDrafter = Callable[[UserProvidedDecodingConfig], Any]


class Speculating(NamedTuple):
    """What speculation changes of an executor. `resource_managers` come before the KV cache."""

    speculation: Speculation
    decoder: Decoder
    resource_managers: tuple[BaseResourceManager, ...] = ()


def build_speculation(
    config: SpeculativeConfig | None,
    decoder: Decoder,
    comm: Comm,
    kv_cache: KVCache,
    *,
    max_num_tokens: int,
    max_samples: int,
    vocab_size: int,
    make_drafter: MakeDrafter,
    on_gpu: bool = False,
) -> Speculating:
    """`make_drafter` gives a user's drafter: the object itself, or one of the class that its path names."""
    if config is None:
        return Speculating(NoSpeculation(), decoder)
    limits = DraftLimits(config.max_draft_len, max_num_tokens, max_samples, vocab_size, config.max_concurrency)
    window = AcceptanceWindow(config.acceptance_window or 0, config.acceptance_length_threshold or 0.0)
    pace = DraftPace(GPU_FREE_ROWS if on_gpu else CPU_FREE_ROWS)
    speculation = DraftedSpeculation(_make_drafter(config, comm, make_drafter), limits, window, pace, kv_cache)
    of_user: tuple[BaseResourceManager, ...] = ()
    if isinstance(config, UserProvidedDecodingConfig) and config.resource_manager is not None:
        of_user = (config.resource_manager,)
    return Speculating(speculation, VerifyingDecoder(decoder), (speculation, *of_user))


def _make_drafter(config: SpeculativeConfig, comm: Comm, make_drafter: MakeDrafter) -> Drafter:
    if isinstance(config, NGramDecodingConfig):
        keeps_newest = config.is_keep_all and not config.is_use_oldest
        size, length = config.max_matching_ngram_size, config.max_draft_len
        public = PublicPatterns(size, length, keeps_newest=keeps_newest) if config.is_public_pool else None
        return NGramDrafter(size, keeps_newest=keeps_newest, public=public)
    return UserDrafter(make_drafter(config), comm)
