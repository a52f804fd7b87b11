"""`RopeConfig`: how a model rotates queries and keys by position, read from a config.json.

Five RoPE kinds are known, as transformers 4 spells them (`rope_theta`, `rope_scaling`) and as transformers 5 does
(`rope_parameters`, perhaps one for each kind of layer). Other kinds, and unknown keys inside them, are refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

RopeKind = Literal["default", "linear", "llama3", "yarn", "longrope", "none"]
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
    "longrope": frozenset(
        {"factor", "original_max_position_embeddings", "attention_factor", "short_factor", "long_factor"}
    ),
}
_ALWAYS_KNOWN = frozenset({"rope_type", "type", "rope_theta", "partial_rotary_factor"})


@dataclass(frozen=True, slots=True)
class RopeDefaults:
    """What a family's class takes where config.json does not say, and the key of the base outside the object."""

    theta: float = DEFAULT_THETA
    part: float = 1.0
    theta_key: str = "rope_theta"


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """`original_max_len` is the length before scaling; `attention_factor` multiplies cosines and sines.

    `part` of a head's elements, its first, are rotated. `short_factors` and `long_factors` (longrope) slow each pair:
    the former in a table of at most `original_max_len` positions, the latter in a longer one. "none" leaves all as it
    is.
    """

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
    part: float = 1.0
    short_factors: tuple[float, ...] = ()
    long_factors: tuple[float, ...] = ()

    @classmethod
    def from_hf(
        cls,
        raw: Mapping[str, Any],
        max_len: int,
        source: str,
        defaults: RopeDefaults | None = None,
        layer_kind: str | None = None,
    ) -> RopeConfig:
        """If both spellings are there, they must mean the same: transformers 5 ignores `rope_parameters` then,
        transformers 4 ignores `rope_scaling`.

        Args:
            layer_kind: the kind of layer whose `rope_parameters` are meant, where there is an object for each kind.

        Raises:
            ValueError: names the key and what is wrong with it.
        """
        defaults = defaults or RopeDefaults()
        new, old = (
            _read(raw, key, max_len, source, defaults, layer_kind) for key in ("rope_parameters", "rope_scaling")
        )
        if raw.get("rope_parameters") and raw.get("rope_scaling") and new != old:
            raise ValueError(
                f"{source}: rope_scaling is {raw['rope_scaling']!r} beside rope_parameters {raw['rope_parameters']!r}, "
                f"which means another rotation; keep one of them"
            )
        return new if raw.get("rope_parameters") else old

    def width(self, head_dim: int) -> int:
        """Elements of a head that are rotated."""
        return int(head_dim * self.part)

    def max_len(self, max_position_embeddings: int) -> int:
        """Positions that the model may use: some configs state the length before scaling."""
        if self.kind == "linear":
            return int(max_position_embeddings * self.factor)
        if self.kind == "yarn":
            return max(max_position_embeddings, int(self.original_max_len * self.factor))
        return max_position_embeddings


def _read(
    raw: Mapping[str, Any], key: str, max_len: int, source: str, defaults: RopeDefaults, layer_kind: str | None
) -> RopeConfig:
    where, fields = f"{source}: {key}", raw.get(key) or {}
    if layer_kind is not None and isinstance(fields, Mapping) and isinstance(fields.get(layer_kind), Mapping):
        where, fields = f"{where}.{layer_kind}", fields[layer_kind]
    if not isinstance(fields, Mapping):
        raise ValueError(f"{where} is {fields!r}, must be an object")
    kind = fields.get("rope_type", fields.get("type", "default"))
    if fields.get("type", kind) != kind:
        raise ValueError(f"{where} has rope_type {kind!r} and type {fields['type']!r}, must be the same")
    if kind not in _KEYS:
        raise ValueError(f"{where} has rope_type {kind!r}; supported: {', '.join(_KEYS)}")
    reader, top = _Fields(fields, where), _Fields(raw, source)
    reader.refuse_unknown(_KEYS[kind] | _ALWAYS_KNOWN)
    theta, part = _theta(reader, top, defaults), _part(reader, top, defaults.part)
    return replace(_of_kind(kind, reader, top, theta, max_len), part=part)


def _of_kind(kind: str, reader: _Fields, top: _Fields, theta: float, max_len: int) -> RopeConfig:
    match kind:
        case "linear":
            return RopeConfig("linear", theta, reader.required("factor"))
        case "llama3":
            return RopeConfig(
                "llama3",
                theta,
                reader.required("factor"),
                int(reader.number("original_max_position_embeddings", max_len)),
                reader.required("low_freq_factor"),
                reader.required("high_freq_factor"),
            )
        case "yarn":
            return _yarn(reader, theta, max_len)
        case "longrope":
            return _longrope(reader, top, theta, max_len)
        case _:
            return RopeConfig("default", theta)


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


def _theta(reader: _Fields, top: _Fields, defaults: RopeDefaults) -> float:
    """From inside the object or from the top of the file; if it is in both, they must be equal."""
    key = defaults.theta_key
    base = top.number(key, defaults.theta)
    theta = reader.number("rope_theta", base)
    if top.fields.get(key) is not None and theta != base:
        raise ValueError(f"{reader.where}.rope_theta is {theta:g} and {key} on top of the file {base:g}; keep one")
    return theta


def _part(reader: _Fields, top: _Fields, default: float) -> float:
    base = top.number("partial_rotary_factor", default)
    part = reader.number("partial_rotary_factor", base)
    if part > 1 or (top.fields.get("partial_rotary_factor") is not None and part != base):
        raise ValueError(
            f"{reader.where}.partial_rotary_factor is {part:g} and partial_rotary_factor on top of the file {base:g}; "
            f"supported: the same number, at most 1"
        )
    return part


def _longrope(reader: _Fields, top: _Fields, theta: float, max_len: int) -> RopeConfig:
    """The length before scaling may also be on top of the file, which then counts, as in transformers."""
    key = "original_max_position_embeddings"
    original = int(top.number(key, reader.number(key, max_len)))
    factor = reader.number("factor", max_len / original)
    inferred = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return RopeConfig(
        kind="longrope",
        theta=theta,
        factor=factor,
        original_max_len=original,
        attention_factor=reader.number("attention_factor", inferred),
        short_factors=reader.numbers("short_factor"),
        long_factors=reader.numbers("long_factor"),
    )


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

    def numbers(self, key: str) -> tuple[float, ...]:
        value = self.fields.get(key)
        if not isinstance(value, list) or not value:
            raise ValueError(f"{self.where}.{key} is {value!r}, must be a list of numbers")
        return tuple(_Fields({key: each}, self.where).required(key) for each in value)

    def required(self, key: str) -> float:
        if self.fields.get(key) is None:
            raise ValueError(f"{self.where} lacks {key!r}")
        return self.number(key, 0.0)
