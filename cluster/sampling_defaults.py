"""`SamplingDefaults`: what a checkpoint says of sampling, for the fields that a request leaves out.

Ranks read it from `generation_config.json` (`workers.models.generation_config`) and report it with `ModelInfo`. Whoever
resolves a request's sampling fields applies it.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from tensorweave.cluster.errors import WireError
from tensorweave.cluster.fields import as_int, checked
from tensorweave.cluster.sampling_spec import KNOBS, SamplingKnobs


@dataclass(kw_only=True, slots=True)
class SamplingDefaults(SamplingKnobs):
    """None: the checkpoint says nothing. `max_tokens` bounds an answer."""

    max_tokens: int | None = None

    def to_wire(self) -> dict[str, Any]:
        """The fields that have a value."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if value is not None}

    @classmethod
    def from_wire(cls, fields: Any) -> SamplingDefaults:
        values: dict[str, Any] = {}
        for name, value in checked(fields, "sampling_defaults", dict).items():
            if name == "max_tokens":
                values[name] = as_int(value, name)
            elif name in KNOBS:
                values[name] = KNOBS[name].read(value, name)
            else:
                raise WireError(f"unknown sampling default {str(name)[:64]!r}")
        return cls(**values)
