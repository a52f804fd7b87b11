"""The families that are served, and the one place where a config.json becomes a `ModelConfig`.

Every key is read, known to change nothing, or refused by name. Keys are in transformers 4's spelling or 5's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from tensorweave.workers.models.config import ModelConfig
from tensorweave.workers.models.config_fields import ConfigFields
from tensorweave.workers.models.config_keys import refuse_unknown_keys
from tensorweave.workers.models.families.family import Family
from tensorweave.workers.models.families.gemma import GEMMA2, GEMMA3, GEMMA3_WITH_VISION
from tensorweave.workers.models.families.glm import GLM, GLM4
from tensorweave.workers.models.families.gpt_oss import GPT_OSS
from tensorweave.workers.models.families.granite import GRANITE, GRANITE_HYBRID
from tensorweave.workers.models.families.llama import LLAMA
from tensorweave.workers.models.families.mistral import MISTRAL
from tensorweave.workers.models.families.mixtral import MIXTRAL
from tensorweave.workers.models.families.olmo import OLMO2, OLMO3
from tensorweave.workers.models.families.phi3 import PHI3
from tensorweave.workers.models.families.qwen2 import QWEN2
from tensorweave.workers.models.families.qwen2_moe import QWEN2_MOE
from tensorweave.workers.models.families.qwen3 import QWEN3
from tensorweave.workers.models.families.qwen3_moe import QWEN3_MOE
from tensorweave.workers.models.families.smollm3 import SMOLLM3
from tensorweave.workers.models.generation_config import (
    GenerationConfig,
    load_generation_config,
    read_json,
    unite_end_ids,
)
from tensorweave.workers.models.quantized.table import read_quantization, with_own_file

_ALL: Final = (
    LLAMA,
    MISTRAL,
    QWEN2,
    QWEN3,
    MIXTRAL,
    QWEN2_MOE,
    QWEN3_MOE,
    GPT_OSS,
    PHI3,
    GRANITE,
    GRANITE_HYBRID,
    SMOLLM3,
    OLMO2,
    OLMO3,
    GLM,
    GLM4,
    GEMMA2,
    GEMMA3,
    GEMMA3_WITH_VISION,
)
FAMILIES: Final = {family.architecture: family for family in _ALL}


def load_model_config(path: str | Path) -> ModelConfig:
    """Read `path`/config.json, and the end ids of `path`/generation_config.json where there is one.

    Raises:
        ValueError: names the file, the key, its value and what is supported.
    """
    file = Path(path) / "config.json"
    if not file.is_file():
        raise ValueError(f"{path} is not a Hugging Face model directory: it has no config.json")
    config = read_model_config(with_own_file(read_json(file), Path(path)), str(file))
    end_ids = load_generation_config(path).end_ids
    return replace(config, end_ids=unite_end_ids(config.sizes.vocab_size, config.end_ids, end_ids))


def read_model_config(raw: Mapping[str, Any], source: str = "config.json") -> ModelConfig:
    """From a parsed config.json; `source` names it in errors, which are `load_model_config`'s."""
    family = _find_family(ConfigFields(raw, source))
    quantization = read_quantization(raw, source)
    if quantization is not None and family.nested_names:
        raise ValueError(
            f"{source}: {family.architecture} is part of a larger model, which is supported where it is not "
            f"quantized (float32, bfloat16, float16)"
        )
    raw = family.common(raw)
    refuse_unknown_keys(raw, family.keys, source, family.own_code)
    fields = ConfigFields({**family.defaults, **raw}, source)
    _refuse_what_no_family_has(fields, family)
    sizes = fields.sizes(family.default_kv_heads, family.default_head_dim, family.norm_offset)
    if family.experts is not None:
        sizes = replace(sizes, experts=family.experts(fields))
    max_len, ropes = fields.count("max_position_embeddings"), family.ropes(fields)
    return ModelConfig(
        architecture=family.architecture,
        sizes=sizes,
        layers=family.layers(fields, sizes),
        ropes=ropes,
        max_seq_len=min((rope.max_len(max_len) for rope in ropes if rope.kind != "none"), default=max_len),
        ends=family.ends(fields, sizes),
        nested_names=family.nested_names,
        has_stacked_experts=family.has_stacked_experts,
        has_tied_embeddings=fields.flag("tie_word_embeddings"),
        checkpoint_dtype=fields.dtype(),
        quantization=quantization,
        end_ids=unite_end_ids(sizes.vocab_size, GenerationConfig(raw, source).end_ids),
    )


def _find_family(fields: ConfigFields) -> Family:
    names, model_type = fields.raw.get("architectures"), fields.raw.get("model_type")
    if not names:
        names = [family.architecture for family in FAMILIES.values() if family.model_type == model_type]
        if not names:
            raise fields.wrong("model_type", ", ".join(family.model_type for family in FAMILIES.values()))
    if not isinstance(names, list) or len(names) != 1 or names[0] not in FAMILIES:
        raise fields.wrong("architectures", ", ".join(FAMILIES))
    family = FAMILIES[names[0]]
    if model_type not in (None, family.model_type):
        raise fields.wrong("model_type", f"{family.model_type!r} for this architecture")
    return family


def _refuse_what_no_family_has(fields: ConfigFields, family: Family) -> None:
    if fields.raw.get("hidden_act", "silu") not in family.activations:
        raise fields.wrong("hidden_act", ", ".join(sorted(family.activations)))
