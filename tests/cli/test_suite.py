"""Suites: their shapes, token lists and rooflines; running rows against a clock; the command on a CPU."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import xml.etree.ElementTree as ElementTree
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tensorweave.cli import suite_run
from tensorweave.cli.bench_suite import engine_options
from tensorweave.cli.main import build_parser, main
from tensorweave.cli.suite_figures import RowResult, markdown
from tensorweave.cli.suite_plot import bars_svg
from tensorweave.cli.suite_rates import measure_rates
from tensorweave.cli.suite_roofline import Rates, Roofline
from tensorweave.cli.suite_rows import SUITES, Row, digest_of
from tensorweave.cli.suite_run import new_document, run_rows, run_suite, suite_of
from tensorweave.cli.suite_shapes import LLAMA_8B, QWEN3_0_6B, QWEN3_30B_A3B, SMOLLM2_135M, ModelShape

RATES = Rates(read_bytes=3.2e12, operations=790e12, layer_operations=790e12)


def parsed(*words: str) -> argparse.Namespace:
    return build_parser().parse_args(["bench", "suite", *words])


def roofline(layer_dtype: str = "bfloat16", kv_dtype: str = "bfloat16", rates: Rates = RATES) -> Roofline:
    return Roofline(LLAMA_8B, rates, "bfloat16", layer_dtype, kv_dtype)


@pytest.mark.parametrize(
    ("shape", "num_weights"),
    [
        (LLAMA_8B, 8.03e9 - 0.525e9),
        (SMOLLM2_135M, 134.5e6),
        (QWEN3_0_6B, 596e6),
        (QWEN3_30B_A3B, 30.53e9 - 0.311e9),
    ],
    ids=["llama", "smollm2", "qwen3", "qwen3-moe"],
)
def test_the_weights_that_a_step_reads(shape: ModelShape, num_weights: float) -> None:
    """The models' published sizes, without the embedding where the head is another matrix."""
    assert shape.num_layer_weights + shape.num_head_weights == pytest.approx(num_weights, rel=2e-3)


def test_what_the_8b_shape_reads() -> None:
    assert roofline().weight_bytes(1) == pytest.approx(15.01e9, rel=1e-3)
    assert roofline(layer_dtype="fp8").weight_bytes(1) == pytest.approx(8.03e9, rel=1e-3)
    assert LLAMA_8B.num_kv_elements * 2 == 131072


def test_what_a_mixture_s_step_reads_and_multiplies() -> None:
    """3.3e9 of its 30.5e9 weights are active, by its model card, with embedding and head."""
    shape = QWEN3_30B_A3B
    assert shape.num_token_weights + 2 * shape.num_head_weights == pytest.approx(3.35e9, rel=2e-2)
    assert shape.num_read_weights(1) == pytest.approx(shape.num_token_weights)
    assert shape.num_read_weights(10000) == pytest.approx(shape.num_layer_weights)
    experts = 48 * 128 * 3 * 2048 * 768
    assert shape.num_read_weights(32) == pytest.approx(shape.num_layer_weights - experts * (15 / 16) ** 32)


def test_a_decode_step_is_bound_by_its_bytes_or_by_its_products() -> None:
    one_step = Row("r", 1, 1023, 2)
    assert roofline().decode_s(one_step) == pytest.approx((15.01e9 + 1024 * 131072) / 3.2e12, rel=1e-3)
    kv_s = 256 * 1024 * 131072 / 3.2e12
    products_s = 256 * 15.01e9 / 790e12
    assert products_s > 15.01e9 / 3.2e12
    assert roofline().decode_s(Row("r", 256, 1023, 2)) == pytest.approx(products_s + kv_s, rel=1e-3)


def test_decode_steps_add_up() -> None:
    longer = roofline().decode_s(Row("r", 8, 100, 51))
    assert longer == pytest.approx(sum(roofline().decode_s(Row("r", 8, 100 + n, 2)) for n in range(50)), rel=1e-9)


def test_prompts_are_bound_by_products_and_attention() -> None:
    linear_s = 8192 * 13.96e9 / 790e12
    attention_s = 4 * 32 * 32 * 128 * 8192 * 8193 / 2 / 790e12
    assert roofline().prefill_s(Row("r", 1, 8192, 1)) == pytest.approx(linear_s + attention_s, rel=1e-3)
    assert roofline().prefill_s(Row("r", 1, 1, 1)) == pytest.approx(15.01e9 / 3.2e12, rel=1e-3)
    assert roofline().row_s(Row("r", 1, 1, 1)) == roofline().prefill_s(Row("r", 1, 1, 1))


def test_formats_of_one_byte_move_half_as_much() -> None:
    row = Row("r", 64, 1000, 200)
    faster = Rates(3.2e12, 790e12, 1400e12)
    kv_s = roofline().decode_s(row) - 199 * 15.01e9 / 3.2e12
    in_fp8 = roofline("fp8", "fp8", faster)
    assert in_fp8.decode_s(row) == pytest.approx(199 * 8.03e9 / 3.2e12 + kv_s / 2, rel=2e-3)
    assert in_fp8.prefill_s(row) < 0.6 * roofline().prefill_s(row)


def test_rows_of_the_issue_s_table() -> None:
    assert [row.name for row in SUITES["h100-8b"].rows] == [
        "b1_128_128", "b1_128_512", "b8_128_128", "b32_128_128", "b64_1000_200", "prefill_2048_1_x64",
        "prefill_8000_1_x16", "b256_128_128", "tput_2048_128_x256", "tput_1000_1000_x512",
    ]  # fmt: skip
    for suite in SUITES.values():
        assert all(row.input_len + row.output_len <= suite.max_seq_len for row in (*suite.rows, *suite.warmups))


def test_prefill_rows_count_prompt_tokens() -> None:
    assert Row("r", 4, 100, 1).num_counted_tokens == 404
    assert Row("r", 4, 100, 2).num_counted_tokens == 8


def test_token_lists_follow_row_run_and_seed() -> None:
    row = Row("b2", 2, 40, 3)
    prompts = row.prompts(1000, seed=7, run=0)
    assert [len(prompt) for prompt in prompts] == [40, 40]
    assert prompts == row.prompts(1000, seed=7, run=0)
    others = [row.prompts(1000, 7, 1), row.prompts(1000, 8, 0), Row("b3", 2, 40, 3).prompts(1000, 7, 0)]
    assert len({digest_of(lists) for lists in (prompts, *others)}) == 4


def test_a_digest_sees_where_a_prompt_ends() -> None:
    assert digest_of([[1, 2], [3]]) != digest_of([[1], [2, 3]])
    assert digest_of([[1, 2], [3]]) == digest_of([[1, 2], [3]])


def test_rows_are_chosen_in_the_suite_s_order() -> None:
    suite = SUITES["tiny"]
    assert [row.name for row in suite.choose(["b4_16_8", "b1_16_8"])] == ["b1_16_8", "b4_16_8"]
    assert suite.choose(None) == list(suite.rows)
    with pytest.raises(ValueError, match="has no row b9; it has b1_16_8"):
        suite.choose(["b9"])


def exact(prompts: list[list[int]], output_len: int) -> list[int]:
    return [output_len] * len(prompts)


def test_every_run_has_prompts_of_its_own() -> None:
    suite = SUITES["tiny"]
    results = list(run_rows(suite, suite.rows, exact, parsed("tiny")))
    assert [len(result.runs_s) for result in results] == [2, 2, 1]
    digests = [digest for result in results for digest in result.digests]
    assert len(set(digests)) == 5
    assert [r.digests for r in run_rows(suite, suite.rows, exact, parsed("tiny"))] == [r.digests for r in results]
    assert [len(r.runs_s) for r in run_rows(suite, suite.rows, exact, parsed("tiny", "--runs", "3"))] == [3, 3, 3]


def test_a_row_that_is_limited_in_time_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock advances by a second per reading: two readings time a run, one asks whether another fits."""
    ticks = itertools.count()
    monkeypatch.setattr(suite_run, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))
    suite, args = SUITES["tiny"], parsed("tiny", "--limit-s", "9")
    first, second, third = run_rows(suite, suite.rows, exact, args, deadline_s=9.0, row_s=lambda row: 1.5)
    assert (len(first.runs_s), first.note) == (2, "")
    assert (len(second.runs_s), second.note) == (0, "not run: limited to 9 s in all")
    assert third.as_dict()["note"] == "not run: limited to 9 s in all"
    assert "tok_s" not in third.as_dict()


def test_a_run_that_was_the_last_to_fit_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count()
    monkeypatch.setattr(suite_run, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))
    suite, args = SUITES["tiny"], parsed("tiny", "--limit-s", "5")
    first, *_ = run_rows(suite, suite.rows, exact, args, deadline_s=5.0)
    assert (len(first.runs_s), first.note) == (1, "1 of 2 runs: limited to 5 s in all")


def test_tokens_that_are_missing_are_an_error() -> None:
    suite = SUITES["tiny"]
    with pytest.raises(AssertionError, match="tokens instead of"):
        list(run_rows(suite, suite.rows, lambda prompts, output_len: [output_len - 1] * len(prompts), parsed("tiny")))


def test_a_result_has_its_rate_and_share() -> None:
    result = RowResult(Row("r", 2, 10, 50), [2.0, 1.0], ["a", "b"], roofline_s=0.25).as_dict()
    assert (result["best_s"], result["tok_s"], result["roofline_tok_s"]) == (1.0, 100.0, 400.0)
    assert result["roofline_share"] == 0.25


def document(*results: RowResult, side: str = "tensorweave") -> dict[str, Any]:
    return {**new_document(parsed("tiny"), side, "1.2"), "rows": [result.as_dict() for result in results]}


def test_the_table_and_the_bars_have_all_rows() -> None:
    ran, left_out = RowResult(Row("ran", 2, 10, 50), [1.0], ["a"], 0.25), RowResult(Row("left", 2, 10, 50), note="no")
    ours, rival = document(ran, left_out), document(RowResult(Row("ran", 2, 10, 50), [0.5], ["a"]), side="vLLM")
    text = markdown(ours)
    assert "| ran | 2 | 10 | 50 | 1.000 | 100.0 | 400.0 | 25.0% | 1 |  |" in text
    assert "| left | 2 | 10 | 50 | – | – | – | – | 0 | no |" in text
    root = ElementTree.fromstring(bars_svg([ours, rival]))
    widths = [float(bar.get("width", "nan")) for bar in root.iter("{http://www.w3.org/2000/svg}rect") if bar.get("y")]
    assert widths[-2:] == [520 * 0.25, 520 * 0.5]


def test_figures_are_written_after_every_row(tmp_path: Path) -> None:
    """A run that is killed leaves the rows before."""
    args = parsed("tiny", "--json", str(tmp_path / "out" / "o.json"), "--markdown", str(tmp_path / "out" / "o.md"))
    calls = itertools.count()

    def breaks_at_the_end(prompts: list[list[int]], output_len: int) -> list[int]:
        if next(calls) == 5:  # the first token, a warm-up, two runs of the first row, one of the second
            raise ConnectionError
        return exact(prompts, output_len)

    with pytest.raises(ConnectionError):
        run_suite(args, new_document(args, "ours", "1"), lambda model_dir: nullcontext(breaks_at_the_end))
    written = json.loads((tmp_path / "out" / "o.json").read_text())
    assert [row["row"] for row in written["rows"]] == ["b1_16_8"]
    assert "b1_16_8" in (tmp_path / "out" / "o.md").read_text()


def test_four_bits_are_arguments_of_the_llm() -> None:
    options = engine_options(SUITES["h100-8b"], parsed("h100-8b", "--quantization", "w4a16"))
    assert options["quant_config"] == {"quant_algo": "W4A16", "group_size": 128}
    in_4_bits = Roofline(LLAMA_8B, RATES, "int8", "w4a16", "bfloat16")
    assert in_4_bits.weight_bytes(1) == pytest.approx(6.979e9 * 0.515625 + 0.525e9, rel=1e-3)


def test_quantization_and_changes_are_arguments_of_the_llm() -> None:
    args = parsed("tiny", "--quantization", "fp8", "--kv-dtype", "fp8", "--set", "max_batch_size=4")
    assert engine_options(SUITES["tiny"], args) == {
        "dtype": "float32",
        "max_seq_len": 32768,
        "max_batch_size": 4,
        "max_num_tokens": 256,
        "kv_cache_config": {"max_tokens": 131072, "dtype": "fp8"},
        "quant_config": {"quant_algo": "FP8_PER_CHANNEL_PER_TOKEN"},
    }


def test_rates_are_measured_on_this_machine() -> None:
    rates = measure_rates("cpu", "float32", "float32")
    assert 1e8 < rates.read_bytes < 1e13
    assert 1e8 < rates.operations == rates.layer_operations < 1e15


def test_the_tiny_suite_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [tmp_path / name for name in ("o.json", "o.md", "o.svg")]
    options = [
        word for name, path in zip(("json", "markdown", "plot"), paths, strict=True) for word in (f"--{name}", path)
    ]
    assert main(["bench", "suite", "tiny", "--set", "device=cpu", *map(str, options)]) == 0
    written = json.loads(paths[0].read_text())
    assert [len(row["runs_s"]) for row in written["rows"]] == [2, 2, 1]
    assert all(0 < row["tok_s"] < math.inf and row["roofline_share"] > 0 for row in written["rows"])
    assert written["first_token_s"] >= written["load_s"] > 0
    assert paths[1].read_text() in capsys.readouterr().out
    assert ElementTree.parse(paths[2]).getroot().tag.endswith("svg")


def test_an_unknown_row_is_named_before_anything_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "suite", "tiny", "--rows", "b3"]) == 2
    assert "suite tiny has no row b3" in capsys.readouterr().err


def test_a_model_of_another_shape_has_its_own_roofline(tmp_path: Path) -> None:
    SMOLLM2_135M.write(tmp_path, "bfloat16")
    assert suite_of(parsed("tiny", "--model", str(tmp_path))).shape.num_layer_weights == SMOLLM2_135M.num_layer_weights
    with pytest.raises(ValueError, match=r"has no config\.json"):
        suite_of(parsed("tiny", "--model", str(tmp_path / "gone")))
