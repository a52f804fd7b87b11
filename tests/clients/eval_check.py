"""`tensorweave eval` against lm-eval's own transformers model: python eval_check.py URL MODEL DIR.

Needs `tensorweave[eval]`; DIR is the directory of the model that the service serves in float32. Choices and free text
over a few lines of its own, so nothing is fetched.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

import lm_eval
from lm_eval.tasks import TaskManager

from tensorweave.cli.main import main as tensorweave

CHOICES = [
    ("The capital of France is", ["Paris", "London", "made of cheese"], 0),
    ("Two plus two is", ["five", "four", "a colour"], 1),
    ("Water freezes at zero degrees", ["Celsius", "of freedom", "naïvely — 東京"], 0),
    ("def add(a, b):\n    return a", ["+ b", "- b", "is None"], 0),
    ("The opposite of hot is", ["warm", "cold", "a stove"], 1),
    ("She opened the door with a", ["banana", "key", "cloud"], 1),
    ("One, two, three,", ["seven", "four", "blue"], 1),
    ("The sun rises in the", ["east", "west", "refrigerator"], 0),
]
HEAD = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {path}
test_split: test
doc_to_text: "{{{{question}}}}"
"""
CHOICE_TASK = """
output_type: multiple_choice
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list:
  - metric: acc
  - metric: acc_norm
"""
TEXT_TASK = """
output_type: generate_until
doc_to_target: "{{choices[answer]}}"
generation_kwargs:
  until: ["."]
  max_gen_toks: 12
metric_list:
  - metric: exact_match
"""
TASKS = ("own_choices", "own_text")
TOLERANCE = 5e-4


def write_tasks(folder: Path) -> None:
    data = folder / "data.jsonl"
    rows = [{"question": question, "choices": choices, "answer": answer} for question, choices, answer in CHOICES]
    data.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    for name, rest in zip(TASKS, (CHOICE_TASK, TEXT_TASK), strict=True):
        (folder / f"{name}.yaml").write_text(HEAD.format(name=name, path=data) + rest, encoding="utf-8")


def answers(samples: list[dict[str, Any]]) -> list[Any]:
    ordered = sorted(samples, key=lambda sample: sample["doc_id"])
    return [sample["filtered_resps"] for sample in ordered]


def main() -> None:
    url, _, directory = sys.argv[1:]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (tasks := folder / "tasks").mkdir()
        write_tasks(tasks)
        options = ["--tokenizer", directory, "--tasks", str(tasks), "--json", str(folder / "out.json")]
        assert tensorweave(["eval", "--url", url, *options, "--min", "own_choices:acc=0.01"]) == 0
        assert tensorweave(["eval", "--url", url, *options[:4], "--min", "acc=1.01"]) == 3
        ours = json.loads((folder / "out.json").read_text(encoding="utf-8"))
        theirs = lm_eval.simple_evaluate(
            model="hf",
            model_args={"pretrained": directory, "dtype": "float32", "device": "cpu"},
            tasks=list(TASKS),
            task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
            log_samples=True,
        )
    for task in TASKS:
        for figure, value in theirs["results"][task].items():
            if "," in figure and "stderr" not in figure:
                print(f"{task} {figure}: {ours['results'][task][figure]} over HTTP, {value} by transformers")
                assert ours["results"][task][figure] == value
    assert answers(ours["samples"]["own_text"]) == answers(theirs["samples"]["own_text"])
    pairs = [
        (float(told), float(expected))
        for row, other in zip(*(answers(found["samples"]["own_choices"]) for found in (ours, theirs)), strict=True)
        for (told, _), (expected, _) in zip(row, other, strict=True)
    ]
    worst = max(abs(told - expected) for told, expected in pairs)
    print(f"eval: {len(pairs)} log-likelihoods, the largest difference from lm-eval's own is {worst:.6f}")
    assert worst < TOLERANCE


if __name__ == "__main__":
    main()
