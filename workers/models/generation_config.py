"""`GenerationConfig`: generation_config.json or, if there is none, the same keys in config.json, as in transformers.

Its end-of-sequence ids are always used. Its sampling fields become `SamplingDefaults` with `generation_config: auto`;
then a key that would change the tokens and has no counterpart here is refused by name.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from tensorweave.cluster.protocol import SamplingDefaults
from tensorweave.workers.models.config_fields import ConfigFields

# Keys of transformers' GenerationConfig that change tokens, each with the values that switch it off. Other keys that
# are not read limit time, choose a cache or say what `generate` returns.
_UNSUPPORTED: Final[Mapping[str, tuple[Any, ...]]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "diversity_penalty": (0,),
    "penalty_alpha": (0,),
    "dola_layers": (),
    "typical_p": (1,),
    "top_h": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "encoder_repetition_penalty": (1,),
    "encoder_no_repeat_ngram_size": (0,),
    "bad_words_ids": ([],),
    "force_words_ids": ([],),
    "constraints": ([],),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "forced_decoder_ids": ([],),
    "sequence_bias": ({}, []),
    "exponential_decay_length_penalty": (),
    "guidance_scale": (1,),
    "watermarking_config": ({},),
    "token_healing": (False,),
    "stop_strings": ([], ""),
    "min_new_tokens": (0,),
    "min_length": (0,),
}


@dataclass(frozen=True, slots=True)
class GenerationConfig:
    """One parsed file; `source` begins every error."""

    raw: Mapping[str, Any]
    source: str

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Raises ValueError for anything but token ids."""
        value = self.raw.get("eos_token_id")
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if not all(isinstance(i, int) and not isinstance(i, bool) and i >= 0 for i in ids):
            raise self._wrong("eos_token_id", "a token id or a list of them")
        return tuple(ids)

    def sampling_defaults(self) -> SamplingDefaults:
        """With `do_sample: false` decoding is greedy, and temperature, top_k, top_p and min_p are ignored, as in
        transformers.

        Raises:
            ValueError: a value is out of its range, or a key asks for something that is not supported here.
        """
        for key, off in _UNSUPPORTED.items():
            value = self.raw.get(key)
            if value is not None and value not in off:
                raise ValueError(
                    f"{self.source}: {key} is {value!r}, which is not supported as a default; take it out of the file, "
                    f"or set generation_config to 'none', which ignores the file's sampling fields"
                )
        does_sample = self._flag("do_sample")
        temperature = self._number("temperature", 0.0)
        found = SamplingDefaults(
            temperature=1.0 if does_sample and temperature is None else temperature,
            top_k=self._integer("top_k", -1),
            top_p=self._number("top_p", 0.0, 1.0),
            min_p=self._number("min_p", 0.0, 1.0),
            repetition_penalty=self._number("repetition_penalty", 0.0, is_low_open=True),
            no_repeat_ngram_size=self._integer("no_repeat_ngram_size", 0),
            max_tokens=self._integer("max_new_tokens", 1),
        )
        if does_sample is False:
            return replace(found, temperature=0.0, top_k=None, top_p=None, min_p=None)
        return found

    def _flag(self, key: str) -> bool | None:
        value = self.raw.get(key)
        if value is not None and not isinstance(value, bool):
            raise self._wrong(key, "true or false")
        return value

    def _integer(self, key: str, low: int) -> int | None:
        value = self.raw.get(key)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < low):
            raise self._wrong(key, f"a whole number of at least {low}")
        return value

    def _number(self, key: str, low: float, high: float = float("inf"), *, is_low_open: bool = False) -> float | None:
        value = self.raw.get(key)
        if value is None:
            return None
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not low <= value <= high or value == float("inf") or (is_low_open and value == low):
            least = f"above {low:g}" if is_low_open else f"of at least {low:g}"
            raise self._wrong(key, f"a number {least}" + ("" if high == float("inf") else f" and at most {high:g}"))
        return float(value)

    def _wrong(self, key: str, supported: str) -> ValueError:
        return ConfigFields(self.raw, self.source).wrong(key, supported)


def load_generation_config(path: str | Path) -> GenerationConfig:
    """Read the one of the model directory `path`. Raises ValueError if the file is not a JSON object."""
    config = Path(path) / "config.json"
    file = Path(path) / "generation_config.json"
    source = file if file.is_file() else config
    return GenerationConfig(read_json(source) if source.is_file() else {}, str(source))


def unite_end_ids(vocab_size: int, *sources: Iterable[int]) -> tuple[int, ...]:
    """All ids, each once and sorted. One outside the vocabulary can never be generated and is left out."""
    return tuple(sorted({end_id for ids in sources for end_id in ids if end_id < vocab_size}))


def load_sampling_defaults(path: str | Path, wanted: str) -> SamplingDefaults:
    """The checkpoint's defaults if `wanted`, which is `LlmArgs.generation_config`, is 'auto'; else none."""
    return load_generation_config(path).sampling_defaults() if wanted == "auto" else SamplingDefaults()


def read_json(file: Path) -> dict[str, Any]:
    """Raises ValueError if the file is not a JSON object."""
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    if not isinstance(raw, dict):
        raise ValueError(f"{file} holds a {type(raw).__name__}, must be an object")
    return raw
