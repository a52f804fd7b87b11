"""`eval`: thresholds, our task's score, mistakes in the command. `tests/clients/eval_check.py` runs lm-eval itself."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from tensorweave.cli.eval_tasks import json_mode
from tensorweave.cli.evaluate import Threshold, judge
from tensorweave.cli.main import main

TASKS = Path(json_mode.__file__).parent
RESULTS: dict[str, dict[str, Any]] = {
    "a": {"alias": "a", "acc,none": 0.5, "acc_stderr,none": "N/A", "acc_norm,none": 0.25},
    "b": {"alias": "b", "acc,none": 0.75, "exact_match,strict": 1.0, "exact_match,flexible": 0.5},
}


def judged(*texts: str) -> int:
    return judge([Threshold.parse(text) for text in texts], RESULTS)


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("acc=0.5", 0), ("acc=0.6", 3), ("b:acc=0.75", 0), ("b:acc=0.76", 3), ("acc_norm=0.25", 0),
        ("exact_match=0.6", 3), ("exact_match,strict=0.6", 0),
    ],
)  # fmt: skip
def test_a_figure_below_its_threshold_sets_the_exit_code(
    text: str, code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert judged(text) == code
    assert ("below" in capsys.readouterr().err) == (code != 0)


def test_all_figures_below_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert judged("acc=0.9", "acc_norm=0.1") == 3
    assert capsys.readouterr().err.splitlines() == [
        "tensorweave: a acc,none is 0.5, below 0.9",
        "tensorweave: b acc,none is 0.75, below 0.9",
    ]
    assert judge([Threshold.parse("acc=0.1")], {"a": {"acc,none": float("nan")}}) == 3
    with pytest.raises(ValueError, match="no task has 'f1'; there are acc,none, "):
        judged("f1=0.5")
    with pytest.raises(ValueError, match="no task has 'acc_norm'"):
        judged("b:acc_norm=0.1")


@pytest.mark.parametrize("text", ["acc", "acc=high", "=0.5", "a:=1", "acc=nan"])
def test_a_threshold_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="TASK"):
        Threshold.parse(text)


def questions() -> list[dict[str, Any]]:
    return [json.loads(line) for line in (TASKS / "json_mode.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("question", questions(), ids=lambda question: question["question"][:20].replace(" ", "-"))
def test_the_questions_of_json_mode_have_schemas_that_can_fail(question: dict[str, Any]) -> None:
    jsonschema.Draft202012Validator.check_schema(question["schema"])
    doc = {"schema": json.dumps(question["schema"])}
    assert json_mode.score(doc, ['{"no": "such field"}']) == {"parsed": 1.0, "acc": 0.0}
    assert json_mode.score(doc, ['{"no": ']) == {"parsed": 0.0, "acc": 0.0}
    assert json_mode.score(doc, [""]) == json_mode.score(doc, ["[" * 100_000]) == {"parsed": 0.0, "acc": 0.0}


def test_an_answer_counts_if_it_validates_formats_included() -> None:
    properties = {"date": {"type": "string", "format": "date"}}
    doc = {"schema": json.dumps({"type": "object", "properties": properties, "required": ["date"]})}
    assert json_mode.score(doc, ['{"date": "1969-07-20"}\n']) == {"parsed": 1.0, "acc": 1.0}
    assert json_mode.score(doc, ['{"date": "July"}']) == {"parsed": 1.0, "acc": 0.0}


def test_the_task_file_names_what_exists() -> None:
    class Loader(yaml.SafeLoader):
        """Reads `!function` as text."""

    Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))
    task = yaml.load((TASKS / "json_mode.yaml").read_text(), Loader)
    for name in (task["custom_dataset"], task["process_results"]):
        assert hasattr(json_mode, name.removeprefix("json_mode."))
    assert {metric["metric"] for metric in task["metric_list"]} == {"acc", "parsed"}


def test_without_lm_eval_the_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert main(["eval", "--tasks", "json_mode", "--model", "smollm2"]) == 2
    assert "pip install 'tensorweave[eval]'" in capsys.readouterr().err


def test_completions_of_another_service_need_a_tokenizer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tensorweave.cli.evaluate._require_lm_eval", lambda: None)
    monkeypatch.setitem(sys.modules, "tensorweave.cli.evaluate_run", argparse.Namespace(evaluate=None, table=None))
    assert main(["eval", "--tasks", "json_mode", "--url", "http://127.0.0.1:1"]) == 2
    assert "--tokenizer" in capsys.readouterr().err
