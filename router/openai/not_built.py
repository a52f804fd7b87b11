"""Fields of OpenAI's API and of other servers' extensions that are not supported, with the values at which they have no
effect. At these values, and at null, they are accepted; otherwise they are refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

NotBuilt = Mapping[str, tuple[Any, ...]]

IN_BOTH: Final[NotBuilt] = {
    "allowed_token_ids": (),
    "conversation_params": (),
    "detokenize": (True,),
    "early_stopping": (False,),
    "guided_decoding_backend": (),
    "guided_whitespace_pattern": (),
    "kv_transfer_params": (),
    "length_penalty": (1,),
    "logits_processors": ([],),
    "lora_request": (),
    "mm_processor_kwargs": ({},),
    "prompt_ignore_length": (0,),
    "return_context_logits": (False,),
    "return_tokens_as_token_ids": (False,),
    "use_beam_search": (False,),
    "vllm_xargs": ({},),
}

IN_COMPLETIONS: Final[NotBuilt] = {**IN_BOTH, "prompt_embeds": (), "suffix": ("",), "thinking_token_budget": ()}

IN_CHATS: Final[NotBuilt] = {
    **IN_BOTH,
    "audio": (),
    "best_of": (1,),
    "documents": ([],),
    "echo": (False,),
    "modalities": (["text"],),
    "moderation": (),
    "stream_reasoning": (True,),
    "web_search_options": (),
}
