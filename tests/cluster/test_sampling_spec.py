"""A knob is defined once: every form of a request has it, with its range, and docs/sampling.md describes it."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest

from tensorweave import SamplingParams
from tensorweave.cluster.errors import RequestRejected, WireError
from tensorweave.cluster.protocol import GenerateRequest, SamplingDefaults, SamplingSpec
from tensorweave.cluster.sampling_spec import KNOBS, SPEC_OFF
from tensorweave.llmapi.sampling_reference import render
from tensorweave.router.openai.parsing import check_fields
from tensorweave.router.openai.requests import CompletionRequest
from tensorweave.router.sampling.fields import SamplingFields
from tensorweave.workers.executor.admission import check_fits
from tests.router.serving import model_info

PAGE = Path(__file__).resolve().parents[2] / "docs" / "sampling.md"


def body(**fields: Any) -> CompletionRequest:
    return check_fields(CompletionRequest, {"model": "m", "prompt": "p", **fields})


def inside(name: str) -> Any:
    """A value that a request may give, and that is not the one that switches the knob off."""
    knob = KNOBS[name]
    return 1 if knob.is_integer else (knob.low + min(knob.high, 2)) / 2 + 0.25


@pytest.mark.parametrize("name", KNOBS)
def test_every_form_has_the_knob(name: str) -> None:
    value = inside(name)
    assert getattr(body(**{name: value}), name) == value
    for form in (SamplingParams, SamplingFields, SamplingDefaults):
        assert getattr(form(), name) is None
        assert getattr(form(**{name: value}), name) == value
    defaults = SamplingDefaults(**{name: value})
    assert SamplingDefaults.from_wire(defaults.to_wire()) == defaults
    spec = SamplingSpec(9, **{name: value})
    assert spec.to_wire() == {"max_tokens": 9, name: value}
    assert SamplingSpec.from_wire(spec.to_wire()) == spec
    check_fits(GenerateRequest("r", [1], spec), model_info())
    with pytest.raises(WireError, match=name):
        SamplingSpec.from_wire({"max_tokens": 9, name: "1"})


@pytest.mark.parametrize("name", KNOBS)
def test_values_out_of_the_range_are_refused_by_name(name: str) -> None:
    knob = KNOBS[name]
    wrong: list[float] = [knob.low if knob.is_low_open else knob.asked_low - 1]
    wrong += [knob.high + 1] if math.isfinite(knob.high) else []
    for value in wrong:
        for make in (body, SamplingFields):
            with pytest.raises(RequestRejected) as refused:
                make(**{name: value})
            assert refused.value.param == name
    beyond = knob.low - 1
    with pytest.raises(RequestRejected) as refused:
        check_fits(
            GenerateRequest("r", [1], SamplingSpec(9, **{name: beyond if beyond != SPEC_OFF[name] else -2})),
            model_info(),
        )
    assert refused.value.param == name


def test_only_http_has_openais_bound_of_the_temperature() -> None:
    assert SamplingFields(temperature=3.0).temperature == 3.0
    with pytest.raises(RequestRejected, match="temperature"):
        body(temperature=3.0)


def test_a_spec_has_a_value_that_switches_each_knob_off() -> None:
    assert KNOBS.keys() <= SPEC_OFF.keys()
    assert [f.name for f in dataclasses.fields(SamplingSpec) if f.name not in SPEC_OFF] == ["max_tokens"]


def test_the_page_is_current() -> None:
    command = "python -m tensorweave.llmapi.sampling_reference docs/sampling.md"
    assert PAGE.read_text(encoding="utf-8") == render(), f"run: {command}"
