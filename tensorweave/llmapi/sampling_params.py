"""`SamplingParams`: how a person asks for tokens. `router.sampling` resolves it to the wire's `SamplingSpec`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(kw_only=True, slots=True)
class SamplingParams:
    """Greedy when temperature, top_p and top_k are all unset, or with temperature 0, top_p 0 or top_k 1.

    Order of the transforms: temperature, min_p, top_k, top_p. The same seed, prompt and settings give the same tokens
    in any batch.

    Args:
        max_tokens: Most tokens to generate.
        min_tokens: No end-of-sequence and no stop token before this many are out.
        temperature: Divides the logits; above 1 flatter, below 1 sharper.
        top_k: Sample among the k likeliest tokens; 0 or None: all.
        top_p: Sample among the likeliest tokens that together reach this probability.
        min_p: Drop tokens less likely than this share of the likeliest one's probability.
        seed: Decides the random numbers; None: drawn anew for each request.
        stop: Strings that end the text where they first appear.
        stop_token_ids: Token ids that end the sequence.
        include_stop_str_in_output: Keep the stop string at the end of the text.
        ignore_eos: Go on after the model's end-of-sequence token.
        end_id: End-of-sequence id in place of the tokenizer's and the model's.
        detokenize: Make text of the tokens.
        add_special_tokens: Let the tokenizer add its special tokens to a text prompt.
        skip_special_tokens: Leave special tokens out of the text.
        spaces_between_special_tokens: Put spaces between special tokens in the text.
        truncate_prompt_tokens: Keep only the last k tokens of the prompt.
    """

    max_tokens: int = 32
    min_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    end_id: int | None = None
    detokenize: bool = True
    add_special_tokens: bool = True
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    truncate_prompt_tokens: int | None = None
