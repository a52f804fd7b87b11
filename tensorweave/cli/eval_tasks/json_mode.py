"""The task `json_mode` of `tensorweave eval`: its questions, and the score of an answer. lm-eval loads this file by its
path."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema


def load_questions(**_: Any) -> dict[str, Any]:
    """`question` and `schema`, a JSON Schema as text, of each line of the file beside this one."""
    import datasets

    lines = Path(__file__).with_name("json_mode.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    rows = [{"question": row["question"], "schema": json.dumps(row["schema"])} for row in rows]
    return {"test": datasets.Dataset.from_list(rows)}


def score(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """`parsed`: whether the answer is JSON; `acc`: whether it also validates against the schema."""
    try:
        answer = json.loads(results[0] or "")
    except (ValueError, RecursionError):
        return {"parsed": 0.0, "acc": 0.0}
    schema = json.loads(doc["schema"])
    validator = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker())
    return {"parsed": 1.0, "acc": float(validator.is_valid(answer))}
