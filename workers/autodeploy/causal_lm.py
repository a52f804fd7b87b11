"""Builds a causal language model of transformers with paged attention in it; what cannot run so is refused by name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM

from tensorweave.workers.autodeploy.attention import IMPLEMENTATION, register
from tensorweave.workers.engine_dir.manifest import EngineManifest
from tensorweave.workers.models.checkpoint import refuse_adapters
from tensorweave.workers.models.generation_config import read_json
from tensorweave.workers.models.rope_config import refuse_two_rotations

_PAGED_LAYERS: Final = frozenset({"full_attention", "sliding_attention"})
_DTYPES: Final = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, slots=True)
class CausalLmConfig:
    """transformers' own configuration: of the whole model, and of its text part."""

    whole: Any
    text: Any

    @property
    def name(self) -> str:
        return f"{MODEL_FOR_CAUSAL_LM_MAPPING[type(self.whole)].__name__} ({self.whole.model_type})"

    @property
    def checkpoint_dtype(self) -> str:
        name = str(self.whole.dtype).removeprefix("torch.")
        return name if name in _DTYPES else "float32"

    def max_seq_len(self, wanted: int | None) -> int:
        """The longest sequence: within the model's positions, and where no rotation depends on a batch's longest
        sequence."""
        limit = getattr(self.text, "max_position_embeddings", None) or wanted
        if limit is None:
            raise ValueError(f"{self.name}: config.json has no max_position_embeddings; give max_seq_len")
        longest = min(limit, wanted or limit)
        for rope in self._rotations():
            if rope.get("rope_type") in ("dynamic", "longrope"):
                longest = min(longest, int(rope.get("original_max_position_embeddings") or longest))
        return longest

    @property
    def end_ids(self) -> tuple[int, ...]:
        """The end ids of the whole and of the text part together."""
        found: list[int] = []
        for ids in (self.whole.eos_token_id, self.text.eos_token_id):
            found += ids if isinstance(ids, list | tuple) else [] if ids is None else [ids]
        return tuple(dict.fromkeys(found))

    def _rotations(self) -> Iterator[dict[str, Any]]:
        rope = getattr(self.text, "rope_parameters", None) or {}
        yield from ([rope] if "rope_type" in rope else [part for part in rope.values() if isinstance(part, dict)])


def read_causal_lm_config(path: Path) -> CausalLmConfig:
    """Raises ValueError, which names the architecture, if config.json shows that it cannot run."""
    if EngineManifest.read(path) is not None:
        raise ValueError(f"{path} is an engine directory; backend '_autodeploy' needs a checkpoint")
    refuse_adapters(path)
    if (file := path / "config.json").is_file():
        raw = read_json(file)
        for part in (raw, raw.get("text_config")):
            refuse_two_rotations(part if isinstance(part, dict) else {}, str(file))
    try:
        whole = AutoConfig.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path}: transformers cannot read its config: {str(error).strip().splitlines()[0]}") from None
    refuse = f"backend '_autodeploy' cannot run {', '.join(whole.architectures or [whole.model_type])}:"
    if whole.is_encoder_decoder:
        raise ValueError(f"{refuse} it is an encoder-decoder model")
    if type(whole) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f"{refuse} transformers has no causal language model of type {whole.model_type!r}")
    if getattr(whole, "quantization_config", None):
        raise ValueError(f"{refuse} its checkpoint is quantized")
    model_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(whole)]
    if model_class._is_stateful:
        raise ValueError(f"{refuse} it keeps a state that is not keys and values (a state-space or recurrent model)")
    if not model_class.is_backend_compatible():
        raise ValueError(f"{refuse} its attention cannot be replaced")
    text = whole.get_text_config()
    if odd := sorted(set(getattr(text, "layer_types", None) or ()) - _PAGED_LAYERS):
        raise ValueError(
            f"{refuse} it has layers of type {', '.join(odd)}; supported: {', '.join(sorted(_PAGED_LAYERS))}"
        )
    return CausalLmConfig(whole, text)


def load_causal_lm(
    path: Path, config: CausalLmConfig, load_format: str, dtype: torch.dtype, device: torch.device
) -> Any:
    """Build the model in evaluation mode from safetensors or, for 'dummy', with seeded random weights.

    Raises:
        ValueError: the checkpoint cannot be loaded, or its tensors are not exactly the model's.
    """
    register()
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": IMPLEMENTATION}
    if load_format == "dummy":
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config.whole, **options)
        return model.to(device).eval().requires_grad_(False)
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            path, local_files_only=True, use_safetensors=True, output_loading_info=True, **options
        )
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{path}: transformers cannot load it: {str(error).strip().splitlines()[0]}") from None
    for what in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if names := sorted(str(name) for name in report[what]):
            raise ValueError(f"{path}: the checkpoint of {config.name} has {what}: {', '.join(names[:8])}")
    return model.to(device).eval().requires_grad_(False)
