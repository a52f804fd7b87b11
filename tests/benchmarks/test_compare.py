"""The comparison of two suites: what counts, and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from benchmarks.compare import NotComparable, compared, table
from tensorweave.cli.main import build_parser
from tensorweave.cli.suite_figures import RowResult
from tensorweave.cli.suite_rows import Row
from tensorweave.cli.suite_run import new_document

DECODE, PREFILL = Row("decode", 4, 10, 50), Row("prefill", 4, 100, 1)


def document(side: str, *results: RowResult) -> dict[str, Any]:
    args = build_parser().parse_args(["bench", "suite", "tiny"])
    return {**new_document(args, side, "1.0"), "rows": [result.as_dict() for result in results]}


def both() -> tuple[dict[str, Any], dict[str, Any]]:
    ours = document(
        "tensorweave",
        RowResult(DECODE, [2.0, 1.6, 1.0], ["a", "b", "c"], roofline_s=0.8),
        RowResult(PREFILL, [0.5], ["d"], roofline_s=0.25),
        RowResult(Row("long", 1, 1, 1), note="not run: limited to 9 s in all"),
    )
    return ours, document("vLLM", RowResult(DECODE, [2.4, 2.0], ["a", "b"]), RowResult(PREFILL, [0.4], ["d"]))


def test_runs_count_that_both_have() -> None:
    decode, prefill, left_out = compared(*both())
    assert (decode["num_runs"], decode["ours_tok_s"], decode["rival_tok_s"]) == (2, 200 / 1.6, 100.0)
    assert (decode["ratio"], decode["ours_share"], decode["rival_share"]) == (1.25, 0.5, 0.4)
    assert (prefill["ours_tok_s"], prefill["rival_tok_s"]) == (404 / 0.5, 404 / 0.4)
    assert left_out["note"] == "not run: limited to 9 s in all"
    assert "ratio" not in left_out


def test_the_table() -> None:
    lines = table(*both()).splitlines()
    assert "| decode | 100.0 | 125.0 | 1.250 × | 250.0 | 40.0% | 50.0% | 2 |  |" in lines
    assert "| prefill | 1,010.0 | 808.0 | 0.800 × | 1,616.0 | 62.5% | 50.0% | 1 |  |" in lines


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("card", {"name": "another", "uuid": "1", "driver": "2"}),
        ("quantization", "fp8"),
        ("kv_dtype", "fp8"),
        ("suite", "smollm2"),
        ("seed", 1),
        ("weights", "real"),
        ("dtype", "bfloat16"),
    ],
)
def test_another_card_or_format_is_refused(key: str, value: Any) -> None:
    ours, rival = both()
    with pytest.raises(NotComparable, match="different"):
        compared(ours, {**rival, key: value})


def test_other_token_lists_are_refused() -> None:
    ours, rival = both()
    other = copy.deepcopy(rival)
    other["rows"][0]["digests"][1] = "e"
    with pytest.raises(NotComparable, match="decode: different token lists"):
        compared(ours, other)
