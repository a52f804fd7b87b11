"""`SamplingParams`: how a user asks for tokens. `llmapi.sampling_fields` checks it and resolves it to the wire's
`SamplingSpec`. Its knobs are defined in `cluster.sampling_spec`."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from tensorweave.cluster.sampling_spec import KNOBS, SamplingKnobs
from tensorweave.llmapi.guided_decoding import GuidedDecodingParams

_T = TypeVar("_T")
_PROTOTYPE = {"status": "prototype"}


def _describe_knobs(cls: type[_T]) -> type[_T]:
    """Add what the inherited knobs mean to the arguments that the class's docstring describes."""
    knobs = [f"    {name}: {knob.doc}" for name, knob in KNOBS.items()]
    cls.__doc__ = "\n".join([inspect.cleandoc(cls.__doc__ or ""), *knobs])
    return cls


@_describe_knobs
@dataclass(kw_only=True, slots=True)
class SamplingParams(SamplingKnobs):
    """Greedy when temperature, top_p and top_k are all unset, or with temperature 0, top_p 0, top_k 1 or min_p 1.

    Order of the transforms: logits processors, biases and banned words, penalties, temperature, min_p, top_k, top_p.
    The same seed, prompt and settings give the same tokens in any batch, on any gang, and after a recovery, as far as
    the logits round alike: always on CPUs; docs/models.md has what holds on GPUs. Everything is checked when a
    generation is started: what is wrong, or not supported yet, is a ValueError that names it.

    Args:
        end_id: End-of-sequence id instead of the tokenizer's and the model's.
        pad_id: A token id. Batches are packed here, never padded, so no output holds it.
        max_tokens: Most tokens to generate.
        n: Sequences to return. The i-th (from 0) has the seed `seed + i`.
        best_of: Sequences to generate; the `n` with the highest cumulative log-probability are returned, best first.
            Default: `n`.
        use_beam_search: Not supported yet.
        beam_search_diversity_rate: Not supported yet: beam search only.
        early_stopping: Not supported yet: beam search only.
        beam_width_array: Not supported yet: beam search only.
        length_penalty: Not supported yet: beam search only.
        stop: Strings that end the text where they first appear.
        stop_token_ids: Token ids that end the sequence.
        include_stop_str_in_output: Keep the stop string, or the text of the stop token, at the end of the text.
        bad: Strings whose tokens, with and without a space before them, never come to their end in the output.
        bad_token_ids: Token ids, or lists of them, that never come (to their end) in the output.
        ignore_eos: Go on after the model's end-of-sequence token.
        logits_processor: A callable, or a list of them, that edits the logits in place before anything else:
            `(req_id, logits, token_ids, stream_ptr, client_id)` with logits [1, 1, V] and prompt and output in
            `token_ids[0]`. It runs on every rank and must do the same on all.
        apply_batched_logits_processor: Edit this request's logits with the `batched_logits_processor` that `LLM` was
            given.
        guided_decoding: The form that the output must have: a JSON schema, a regular expression, a grammar. With the
            LLM's `reasoning_parser`, that of the output after its reasoning.
        embedding_bias: Added to the logits: a float32 tensor with one number per token of the vocabulary.
        lookahead_config: Not supported yet.
        detokenize: Make text of the tokens.
        add_special_tokens: Let the tokenizer add its special tokens to a text prompt.
        truncate_prompt_tokens: Keep only the last k tokens of the prompt.
        skip_special_tokens: Leave special tokens out of the text.
        spaces_between_special_tokens: Put spaces between special tokens in the text.
        logprobs: Report the log-probabilities of each output token and of so many of the likeliest tokens; 0: of the
            output token alone. They are the model's own, before penalties and temperature.
        prompt_logprobs: The same for the prompt's tokens from the second on; the prompt is then computed in full.
        return_context_logits: Give the logits at every prompt token; the prompt is then computed in full.
        return_generation_logits: Give the model's logits that each output token was sampled from.
        exclude_input_from_output: False: outputs begin with the prompt's tokens and text.
        return_encoder_output: Not supported: there are no encoder models here.
        return_perf_metrics: Give the times of arrival, first and last token.
        additional_model_outputs: Not supported yet.
    """

    end_id: int | None = None
    pad_id: int | None = None
    max_tokens: int = 32
    n: int = 1
    best_of: int | None = None
    use_beam_search: bool = False
    beam_search_diversity_rate: float | None = None
    early_stopping: int | None = None
    beam_width_array: Sequence[int] | None = field(default=None, metadata=_PROTOTYPE)
    length_penalty: float | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    include_stop_str_in_output: bool = False
    bad: str | Sequence[str] | None = None
    bad_token_ids: Sequence[int] | Sequence[Sequence[int]] | None = None
    ignore_eos: bool = False
    logits_processor: Callable[..., Any] | Sequence[Callable[..., Any]] | None = None
    apply_batched_logits_processor: bool = False
    guided_decoding: GuidedDecodingParams | None = None
    embedding_bias: Any = None
    lookahead_config: Any = None
    detokenize: bool = True
    add_special_tokens: bool = True
    truncate_prompt_tokens: int | None = None
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    return_context_logits: bool = False
    return_generation_logits: bool = False
    exclude_input_from_output: bool = True
    return_encoder_output: bool = False
    return_perf_metrics: bool = field(default=False, metadata=_PROTOTYPE)
    additional_model_outputs: Sequence[str] | None = field(default=None, metadata=_PROTOTYPE)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, SamplingParams):
            return NotImplemented
        return all(_are_equal(getattr(self, f.name), getattr(other, f.name)) for f in dataclasses.fields(self))


def _are_equal(one: Any, other: Any) -> bool:
    """Tensors and arrays compare element by element, and have no truth value as a whole."""
    if hasattr(one, "tolist") and hasattr(other, "tolist"):
        one, other = one.tolist(), other.tolist()
    return one is other or bool(one == other)
