"""The keys of a config.json: those that are read for every family, those that change nothing of what a model computes.

Every other key may change the mathematics: it is refused by name, unless the family reads it or its value switches it
off. The keys that change nothing are those of transformers' own classes for these families, and what trainers and
converters leave in real checkpoints.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, Final

_READ: Final = frozenset(
    {
        "architectures",
        "compression_config",
        "dtype",
        "eos_token_id",
        "head_dim",
        "hidden_act",
        "hidden_size",
        "intermediate_size",
        "max_position_embeddings",
        "model_type",
        "num_attention_heads",
        "num_hidden_layers",
        "num_key_value_heads",
        "partial_rotary_factor",
        "quantization_config",
        "rms_norm_eps",
        "rope_parameters",
        "rope_scaling",
        "rope_theta",
        "tie_word_embeddings",
        "torch_dtype",
        "vocab_size",
    }
)

# Training, bookkeeping, what `generate` or a classifier does with the result, how other implementations compute it.
_CHANGES_NOTHING: Final = frozenset(
    {
        "attn_implementation",
        "bos_token_id",
        "chunk_size_feed_forward",
        "finetuning_task",
        "flash_attn",
        "gradient_checkpointing",
        "id2label",
        "initializer_factor",
        "initializer_range",
        "is_decoder",
        "is_llama_config",
        "keys_to_ignore_at_inference",
        "label2id",
        "max_seq_length",
        "max_sequence_length",
        "model_max_length",
        "name_or_path",
        "num_labels",
        "output_attentions",
        "output_hidden_states",
        "output_scores",
        "pad_token_id",
        "prefix",
        "pretraining_tp",
        "problem_type",
        "remove_invalid_values",
        "return_dict",
        "return_dict_in_generate",
        "sep_token_id",
        "seq_length",
        "task_specific_params",
        "tf_legacy_loss",
        "tie_last_hidden_states",
        "tokenizer_class",
        "torchscript",
        "transformers.js_config",
        "transformers_version",
        "unk_token_id",
        "unsloth_fixed",
        "unsloth_version",
        "use_bfloat16",
        "use_cache",
        "use_flash_attention",
        "use_flash_attn",
        "use_mtp",
    }
)
# Sampling fields, which old checkpoints keep here; `workers.models.generation_config` reads those that are used.
_OF_GENERATION: Final = frozenset(
    {
        "bad_words_ids",
        "begin_suppress_tokens",
        "decoder_start_token_id",
        "diversity_penalty",
        "do_sample",
        "early_stopping",
        "encoder_no_repeat_ngram_size",
        "encoder_repetition_penalty",
        "epsilon_cutoff",
        "eta_cutoff",
        "exponential_decay_length_penalty",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "length_penalty",
        "max_length",
        "max_new_tokens",
        "min_length",
        "min_new_tokens",
        "min_p",
        "no_repeat_ngram_size",
        "num_beam_groups",
        "num_beams",
        "num_return_sequences",
        "penalty_alpha",
        "repetition_penalty",
        "suppress_tokens",
        "temperature",
        "top_k",
        "top_p",
        "typical_p",
    }
)
# Keys of other models, with the value at which they change nothing.
_NEUTRAL: Final[Mapping[str, float]] = {
    "embedding_multiplier": 1,
    "full_attn_mod": 1,
    "interpolate_factor": 1,
    "logit_scale": 1,
    "logits_scaling": 1,
    "residual_multiplier": 1,
    "rope_ratio": 1,
}
_TRAINING_WORDS: Final = ("dropout", "pdrop", "aux_loss", "z_loss")


def refuse_unknown_keys(
    raw: Mapping[str, Any], family_keys: Collection[str], source: str, own_code: Collection[str] = ()
) -> None:
    """Raises ValueError that names the first key which may change what the model computes, and its value. `own_code`
    are the classes of repositories that compute what transformers' own class does."""
    for key, value in raw.items():
        if key == "auto_map":
            _check_own_code(value, source, own_code)
        elif not _is_harmless(key, value, family_keys):
            raise ValueError(
                f"{source}: {key} is {value!r}, a key that may change what the model computes and that is not "
                f"supported; if it changes nothing, take it out of the file"
            )


def _is_harmless(key: str, value: Any, family_keys: Collection[str]) -> bool:
    if key in _READ or key in family_keys or key in _CHANGES_NOTHING or key in _OF_GENERATION or key.startswith("_"):
        return True
    if not value:  # null, false, zero or empty: the feature is off
        return True
    return value == _NEUTRAL.get(key) or any(word in key for word in _TRAINING_WORDS)


def _check_own_code(auto_map: Any, source: str, known: Collection[str]) -> None:
    """Raises ValueError if the repository has a model class of its own; configuration and tokenizer classes of its own
    change nothing here."""
    names = auto_map if isinstance(auto_map, Mapping) else {}
    models = [name for name in names if name == "AutoModel" or name.startswith("AutoModelForCausalLM")]
    if own := [name for name in models if names[name] not in known]:
        raise ValueError(
            f"{source}: auto_map names the repository's own code for {', '.join(own)}, which is not run here; if the "
            f"architecture is transformers' own, take auto_map out of the file"
        )
