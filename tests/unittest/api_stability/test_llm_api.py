"""The LLM API stays what its schemas say: signatures, docstrings and statuses; that the checks see every kind of
change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from tensorweave import (
    LLM,
    CacheTransceiverConfig,
    CompletionOutput,
    CudaGraphConfig,
    DisaggregatedParams,
    GuidedDecodingParams,
    KvCacheConfig,
    KvCacheRetentionConfig,
    LoraConfig,
    MoeConfig,
    NGramDecodingConfig,
    PreprocessedInputs,
    QuantConfig,
    RequestOutput,
    SamplingParams,
    SchedulerConfig,
    SchedulingParams,
    TokenRangeRetentionConfig,
    TorchLlmArgs,
    UserProvidedDecodingConfig,
)
from tensorweave.cluster.strict_model import Field
from tensorweave.llmapi.llm import _TorchLLM
from tensorweave.llmapi.reference import render
from tensorweave.llmapi.status import set_api_status
from tests.unittest.api_stability.api_stability_core import (
    SCHEMAS,
    copy_of_schemas,
    docstring_problems,
    edit,
    schema_of,
    signature_problems,
    status_problems,
)

CLASSES: dict[str, type[Any]] = {
    "llm": LLM,
    "llm_args": TorchLlmArgs,
    "sampling_params": SamplingParams,
    "guided_decoding_params": GuidedDecodingParams,
    "request_output": RequestOutput,
    "completion_output": CompletionOutput,
    "kv_cache_config": KvCacheConfig,
    "lora_config": LoraConfig,
    "scheduler_config": SchedulerConfig,
    "cuda_graph_config": CudaGraphConfig,
    "moe_config": MoeConfig,
    "quant_config": QuantConfig,
    "ngram_decoding_config": NGramDecodingConfig,
    "user_provided_decoding_config": UserProvidedDecodingConfig,
    "cache_transceiver_config": CacheTransceiverConfig,
    "kv_cache_retention_config": KvCacheRetentionConfig,
    "token_range_retention_config": TokenRangeRetentionConfig,
    "scheduling_params": SchedulingParams,
    "disaggregated_params": DisaggregatedParams,
    "preprocessed_inputs": PreprocessedInputs,
}
PAGE = Path(__file__).resolve().parents[3] / "docs" / "llm_api.md"


@pytest.mark.parametrize("name", CLASSES)
def test_signatures_are_those_of_the_schemas(name: str) -> None:
    assert signature_problems(CLASSES[name], name) == []


@pytest.mark.parametrize("name", CLASSES)
def test_docstrings_agree_with_signatures(name: str) -> None:
    assert docstring_problems(CLASSES[name]) == []


@pytest.mark.parametrize("name", CLASSES)
def test_statuses_are_those_of_the_schemas(name: str) -> None:
    assert status_problems(CLASSES[name], name) == []


def test_every_schema_is_of_a_class_and_uses_the_known_keys() -> None:
    files = list(SCHEMAS.glob("references*/*.yaml"))
    assert {file.stem for file in files} == set(CLASSES)
    for file in files:
        for name, entry in yaml.safe_load(file.read_text()).items():
            known = {"parameters", "returns", "status"} if "parameters" in entry else {"type", "default", "status"}
            assert entry.keys() <= known, f"{file.stem}.{name}"
            for parameter in entry.get("parameters", ()):
                assert {"name", "type"} <= parameter.keys() <= {"name", "type", "default"}, f"{file.stem}.{name}"


def test_the_constructor_maps_to_the_committed_arguments() -> None:
    [*named, extra] = schema_of(LLM)["__init__"]["parameters"]
    assert extra == {"name": "kwargs", "type": "Any"}
    committed = {name: entry for name, entry in schema_of(TorchLlmArgs).items() if "status" not in entry}
    assert {parameter["name"]: parameter.get("default") for parameter in named} == {
        name: entry.get("default") for name, entry in committed.items()
    }


def test_the_api_page_is_current() -> None:
    assert PAGE.read_text(encoding="utf-8") == render(), "run: python -m tensorweave.llmapi.reference docs/llm_api.md"


# ---- the checks see what they are for


def test_an_unchanged_copy_passes() -> None:
    class Copy(LLM):
        __doc__ = LLM.__doc__

        @set_api_status("beta")
        def shutdown(self) -> None:
            """End everything at once."""

    assert signature_problems(Copy, "llm") == []
    assert docstring_problems(Copy) == []
    assert status_problems(Copy, "llm") == []


def test_a_changed_signature_is_seen() -> None:
    class Changed(LLM):
        def save(self, engine_dir: bytes) -> None:  # type: ignore[override]
            """Save."""

    class Shorter(LLM):
        def __init__(self, model: str | Path) -> None:
            """Make one."""

    class Narrower(LLM):
        def generate(self, inputs: str) -> RequestOutput:  # type: ignore[override]
            """Generate."""

    for cls, name in ((Changed, "save"), (Shorter, "__init__"), (Narrower, "generate")):
        [problem] = signature_problems(cls, "llm")
        assert problem.startswith(f"llm.{name} is")
        assert "committed: it may not change" in problem


def test_a_new_method_and_a_lost_one_are_seen() -> None:
    class Longer(LLM):
        def warm_up(self) -> None:
            """Warm up."""

    [problem] = signature_problems(Longer, "llm")
    assert problem.startswith("llm.warm_up is new")

    class Lost(LLM):
        save = None  # type: ignore[assignment]
        shutdown = None  # type: ignore[assignment]

    problems = signature_problems(Lost, "llm")
    assert [problem.split(":")[0] for problem in problems] == [
        "llm.save is gone (committed)",
        "llm.shutdown is gone (references)",
    ]


def test_a_changed_default_and_type_are_seen() -> None:
    class Changed(TorchLlmArgs):
        max_batch_size: int = Field(255, status="beta", description="Most requests in one step.")
        revision: str = Field("main", description="Branch, tag or commit of a hub model.")  # type: ignore[assignment]

    problems = signature_problems(Changed, "llm_args")
    assert len(problems) == 2
    assert any("llm_args.max_batch_size is {'type': 'int', 'default': 255}" in problem for problem in problems)
    assert any("llm_args.revision" in problem and "committed" in problem for problem in problems)


@pytest.mark.parametrize(
    ("doc", "complaint"),
    [
        ("", "has no docstring"),
        ("Save it.", "describes []"),
        ("Save it.\n\nArgs:\n    engine_dir:", "does not describe engine_dir"),
        ("Save it.\n\nArgs:\n    directory: Where.", "describes ['directory']"),
        ("Save it.\n\nArgs:\n    engine_dir: Where.\n\nReturns:\n    A path.", "returns None"),
    ],
)
def test_a_wrong_docstring_is_seen(doc: str, complaint: str) -> None:
    class Changed(LLM):
        __doc__ = LLM.__doc__

        def save(self, engine_dir: str | Path) -> None: ...

    Changed.save.__doc__ = doc
    assert any(complaint in problem for problem in docstring_problems(Changed))


def test_an_empty_class_docstring_is_seen() -> None:
    class Silent(LLM):
        __doc__ = ""

    class Unsaid(TorchLlmArgs):
        """Every argument."""

        max_batch_size: int = Field(256, status="beta")

    assert "Silent has no docstring" in docstring_problems(Silent)
    assert docstring_problems(Unsaid) == ["Unsaid.max_batch_size is not described"]


def test_a_wrong_status_is_seen(tmp_path: Path) -> None:
    class Bolder(LLM):
        @set_api_status("prototype")
        def save(self, engine_dir: str | Path) -> None:
            """Save."""

        def get_stats(self, timeout: float = 2.0) -> list[dict[str, Any]]:
            """Tell."""
            return []

    problems = status_problems(Bolder, "llm")
    assert "llm.save is committed and has the status 'prototype' in code" in problems
    assert "llm.get_stats has the status None in code and 'beta' in its schema" in problems
    root = copy_of_schemas(tmp_path)
    edit(root, "references/llm.yaml", lambda schema: schema | {"save": schema_of(LLM)["save"]})
    assert "llm.save is in references and in references_committed" in signature_problems(LLM, "llm", root)
    with pytest.raises(ValueError, match="status is 'stable'"):
        set_api_status("stable")  # type: ignore[arg-type]


def test_statuses_are_in_docstrings_and_fields() -> None:
    assert "Status:\n    beta" in (_TorchLLM.get_stats.__doc__ or "")
    assert "Status:" not in (_TorchLLM.generate.__doc__ or "")
    assert TorchLlmArgs.model_fields["max_batch_size"].json_schema_extra == {"status": "beta"}
    assert TorchLlmArgs.model_fields["dtype"].json_schema_extra is None
