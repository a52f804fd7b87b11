"""The workflows of docs/public_api.md, each done once on a copy of the schemas: add an argument, add a method, promote,
deprecate."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import yaml

from tensorweave import LLM, TorchLlmArgs
from tensorweave.cluster.strict_model import Field
from tensorweave.llmapi.status import set_api_status
from tests.unittest.api_stability.api_stability_core import (
    copy_of_schemas,
    docstring_problems,
    edit,
    signature_problems,
    status_problems,
)


def problems_of(cls: type[Any], name: str, root: Path) -> list[str]:
    return [*signature_problems(cls, name, root), *status_problems(cls, name, root), *docstring_problems(cls)]


def test_workflow_add_an_argument(tmp_path: Path) -> None:
    class WithKnob(TorchLlmArgs):
        """Every constructor argument."""

        prefill_batch_size: int = Field(8, status="prototype", description="Most prompts that one step begins.")

    root = copy_of_schemas(tmp_path)
    assert "llm_args.prefill_batch_size is new" in problems_of(WithKnob, "llm_args", root)[0]
    added = yaml.safe_load("prefill_batch_size:\n  type: int\n  default: 8\n  status: prototype")
    edit(root, "references/llm_args.yaml", lambda schema: schema | added)
    assert problems_of(WithKnob, "llm_args", root) == []
    assert "llm_args.prefill_batch_size is gone (references)" in problems_of(TorchLlmArgs, "llm_args", root)[0]


NEW_METHOD = """
warm_up:
  status: beta
  parameters:
    - name: prompts
      type: list[str]
    - name: kwargs
      type: Any
  returns: int
"""


class WithMethod(LLM):
    __doc__ = LLM.__doc__

    @set_api_status("beta")
    def warm_up(self, prompts: list[str], **kwargs: Any) -> int:
        """Put prompts into the prefix tree.

        Args:
            prompts: What requests will begin with.
            kwargs: Passed on to `generate`.

        Returns:
            Tokens that are cached now.
        """
        return len(prompts)


def test_workflow_add_a_method(tmp_path: Path) -> None:
    root = copy_of_schemas(tmp_path)
    assert "llm.warm_up is new" in problems_of(WithMethod, "llm", root)[0]
    edit(root, "references/llm.yaml", lambda schema: schema | yaml.safe_load(NEW_METHOD))
    assert problems_of(WithMethod, "llm", root) == []


def test_workflow_promote(tmp_path: Path) -> None:
    class Promoted(LLM):
        __doc__ = LLM.__doc__

        def warm_up(self, prompts: list[str], **kwargs: Any) -> int:
            """Put prompts into the prefix tree.

            Args:
                prompts: What requests will begin with.
                kwargs: Passed on to `generate`.

            Returns:
                Tokens that are cached now.
            """
            return len(prompts)

    root = copy_of_schemas(tmp_path)
    edit(root, "references/llm.yaml", lambda schema: schema | yaml.safe_load(NEW_METHOD))
    assert status_problems(Promoted, "llm", root) != []
    entry = yaml.safe_load(NEW_METHOD)["warm_up"]
    edit(root, "references/llm.yaml", lambda schema: {k: v for k, v in schema.items() if k != "warm_up"})
    edit(root, "references_committed/llm.yaml", lambda schema: schema | {"warm_up": entry})
    assert status_problems(Promoted, "llm", root) != [], "a committed entry has no status"
    del entry["status"]
    edit(root, "references_committed/llm.yaml", lambda schema: schema | {"warm_up": entry})
    assert problems_of(Promoted, "llm", root) == []


def test_workflow_deprecate(tmp_path: Path) -> None:
    class Deprecated(LLM):
        __doc__ = LLM.__doc__

        @set_api_status("deprecated")
        def get_stats(self, timeout: float = 2.0) -> list[dict[str, Any]]:
            """Tell the steps' statistics.

            Args:
                timeout: Longest wait.

            Returns:
                One dict a step.
            """
            warnings.warn(
                "get_stats is deprecated and will be removed. Use get_stats_async.", DeprecationWarning, stacklevel=2
            )
            return []

    root = copy_of_schemas(tmp_path)
    assert problems_of(Deprecated, "llm", root) == [
        "llm.get_stats has the status 'deprecated' in code and 'beta' in its schema"
    ]
    edit(
        root,
        "references/llm.yaml",
        lambda schema: schema | {"get_stats": {**schema["get_stats"], "status": "deprecated"}},
    )
    assert problems_of(Deprecated, "llm", root) == []
    assert "deprecated" in (Deprecated.get_stats.__doc__ or "")
    with pytest.warns(DeprecationWarning, match="Use get_stats_async"):
        Deprecated.get_stats(object())  # type: ignore[arg-type]
