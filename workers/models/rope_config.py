"""`RopeConfig`: how a model rotates queries and keys by position, read from a config.json.

Four RoPE kinds are known, as transformers 4 spells them (`rope_theta`, `rope_scaling`) and as transformers 5 does
(`rope_parameters`). Other kinds, unknown keys inside them and partial rotations are refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

RopeKind = Literal["default", "linear", "llama3", "yarn"]
DEFAULT_THETA = 10_000.0

_KEYS: dict[str, frozenset[str]] = {
    "default": frozenset(),
    "linear": frozenset({"factor"}),
    "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}),
    "yarn": frozenset(
        {
            "factor",
            "original_max_position_embeddings",
            "attention_factor",
            "beta_fast",
            "beta_slow",
            "mscale",
            "mscale_all_dim",
            "truncate",
        }
    ),
}
_ALWAYS_KNOWN = frozenset({"rope_type", "type", "rope_theta", "partial_rotary_factor"})


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """`original_max_len` is the length before scaling; `attention_factor` multiplies cosines and sines."""

    kind: RopeKind = "default"
    theta: float = DEFAULT_THETA
    factor: float = 1.0
    original_max_len: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0

    @classmethod
    def from_hf(cls, raw: Mapping[str, Any], max_len: int, source: str) -> RopeConfig:
        """If both spellings are there, they must mean the same: transformers 5 ignores `rope_parameters` then,
        transformers 4 ignores `rope_scaling`.

        Raises:
            ValueError: names the key and what is wrong with it.
        """
        new, old = (cls._from_key(raw, key, max_len, source) for key in ("rope_parameters", "rope_scaling"))
        if raw.get("rope_parameters") and raw.get("rope_scaling") and new != old:
            raise ValueError(
                f"{source}: rope_scaling is {raw['rope_scaling']!r} beside rope_parameters {raw['rope_parameters']!r}, "
                f"which means another rotation; keep one of them"
            )
        return new if raw.get("rope_parameters") else old

    @classmethod
    def _from_key(cls, raw: Mapping[str, Any], key: str, max_len: int, source: str) -> RopeConfig:
        fields: Mapping[str, Any] = raw.get(key) or {}
        if not isinstance(fields, Mapping):
            raise ValueError(f"{source}: {key} is {fields!r}, must be an object")
        kind = fields.get("rope_type", fields.get("type", "default"))
        if fields.get("type", kind) != kind:
            raise ValueError(f"{source}: {key} has rope_type {kind!r} and type {fields['type']!r}, must be the same")
        if kind not in _KEYS:
            raise ValueError(f"{source}: {key} has rope_type {kind!r}; supported: {', '.join(_KEYS)}")
        reader = _Fields(fields, f"{source}: {key}")
        reader.refuse_unknown(_KEYS[kind] | _ALWAYS_KNOWN)
        for where in (fields, raw):
            if where.get("partial_rotary_factor") not in (None, 1, 1.0):
                raise ValueError(
                    f"{source}: partial_rotary_factor is {where['partial_rotary_factor']!r}; supported: 1.0"
                )
        theta = _theta(reader, _Fields(raw, source))
        match kind:
            case "linear":
                return cls("linear", theta, reader.required("factor"))
            case "llama3":
                return cls(
                    "llama3",
                    theta,
                    reader.required("factor"),
                    int(reader.number("original_max_position_embeddings", max_len)),
                    reader.required("low_freq_factor"),
                    reader.required("high_freq_factor"),
                )
            case "yarn":
                return _yarn(reader, theta, max_len)
            case _:
                return cls("default", theta)

    def max_len(self, max_position_embeddings: int) -> int:
        """Positions that the model may use: some configs state the length before scaling."""
        if self.kind == "linear":
            return int(max_position_embeddings * self.factor)
        if self.kind == "yarn":
            return max(max_position_embeddings, int(self.original_max_len * self.factor))
        return max_position_embeddings


def refuse_two_rotations(raw: Mapping[str, Any], source: str) -> None:
    """For models that transformers builds: raises ValueError if the two spellings do not say the same."""
    old, new = raw.get("rope_scaling"), raw.get("rope_parameters")
    if not old or not new or not isinstance(old, Mapping) or not isinstance(new, Mapping):
        return
    one, other = ({"rope_type" if key == "type" else key: part[key] for key in part} for part in (old, new))
    if "rope_theta" not in one:
        other.pop("rope_theta", None)
    if one != other:
        raise ValueError(f"{source}: rope_scaling is {old!r} beside rope_parameters {new!r}; keep one of them")


def _theta(reader: _Fields, top: _Fields) -> float:
    """From inside the object or from the top of the file; if it is in both, they must be equal."""
    base = top.number("rope_theta", DEFAULT_THETA)
    theta = reader.number("rope_theta", base)
    if top.fields.get("rope_theta") is not None and theta != base:
        raise ValueError(f"{reader.where}.rope_theta is {theta:g} and rope_theta on top of the file {base:g}; keep one")
    return theta


def _yarn(reader: _Fields, theta: float, max_len: int) -> RopeConfig:
    original = int(reader.number("original_max_position_embeddings", max_len))
    factor = reader.number("factor", max_len / original)
    mscale, mscale_all = reader.number("mscale", 0.0), reader.number("mscale_all_dim", 0.0)
    inferred = _mscale(factor, mscale) / _mscale(factor, mscale_all) if mscale and mscale_all else _mscale(factor, 1.0)
    truncate = reader.fields.get("truncate", True)
    if not isinstance(truncate, bool):
        raise ValueError(f"{reader.where}.truncate is {truncate!r}, must be true or false")
    return RopeConfig(
        kind="yarn",
        theta=theta,
        factor=factor,
        original_max_len=original,
        beta_fast=reader.number("beta_fast", 32.0),
        beta_slow=reader.number("beta_slow", 1.0),
        truncate=truncate,
        attention_factor=reader.number("attention_factor", inferred),
    )


def _mscale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


@dataclass(frozen=True, slots=True)
class _Fields:
    """Reads the numbers of one JSON object; `where` begins every error."""

    fields: Mapping[str, Any]
    where: str

    def refuse_unknown(self, known: frozenset[str]) -> None:
        for key in self.fields:
            if key not in known:
                raise ValueError(f"{self.where} has unknown key {key!r}; known: {', '.join(sorted(known))}")

    def number(self, key: str, default: float) -> float:
        value = self.fields.get(key)
        if value is None:
            return float(default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise ValueError(f"{self.where}.{key} is {value!r}, must be a number above 0")
        return float(value)

    def required(self, key: str) -> float:
        if self.fields.get(key) is None:
            raise ValueError(f"{self.where} lacks {key!r}")
        return self.number(key, 0.0)
