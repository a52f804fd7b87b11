"""lm-eval against a running service, its log-likelihoods against transformers': python lm_eval_check.py URL MODEL DIR.

Needs `lm-eval[api]`, `transformers` and `torch`; DIR is the model's directory. A multiple-choice task over a few lines
of its own, so nothing is fetched.
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
import torch
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer

QUESTIONS = [
    ("The capital of France is", ["Paris", "London", "made of cheese"], 0),
    ("Two plus two is", ["five", "four", "a colour"], 1),
    ("Water freezes at zero degrees", ["Celsius", "of freedom", "naïvely — 東京"], 0),
    ("def add(a, b):\n    return a", ["+ b", "- b", "is None"], 0),
]
TASK = """
task: own_choices
dataset_path: json
dataset_kwargs:
  data_files:
    test: {path}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
metric_list:
  - metric: acc
"""
TOLERANCE = 5e-4


def evaluate(url: str, model: str, tokenizer: str) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        lines = [
            {"question": question, "choices": choices, "answer": answer} for question, choices, answer in QUESTIONS
        ]
        data = Path(folder, "data.jsonl")
        data.write_text("\n".join(json.dumps(line) for line in lines), encoding="utf-8")
        Path(folder, "own_choices.yaml").write_text(TASK.format(path=data), encoding="utf-8")
        answers = lm_eval.simple_evaluate(
            model="local-completions",
            model_args=f"model={model},base_url={url}/v1/completions,tokenizer={tokenizer},num_concurrent=2",
            tasks=["own_choices"],
            task_manager=TaskManager(include_path=folder),
            log_samples=True,
            bootstrap_iters=0,
        )
    samples: list[dict[str, Any]] = answers["samples"]["own_choices"]
    return samples


def log_likelihood(model: Any, tokenizer: Any, context: str, continuation: str) -> float:
    whole = tokenizer(context + continuation, return_tensors="pt").input_ids
    num_context = len(tokenizer(context).input_ids)
    with torch.inference_mode():
        logprobs = torch.log_softmax(model(whole).logits[0].float(), dim=-1)
    told = logprobs[num_context - 1 : -1].gather(1, whole[0, num_context:, None])
    return float(told.sum())


def main() -> None:
    url, name, folder = sys.argv[1:]
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    worst = 0.0
    for sample in evaluate(url, name, folder):
        for request, (told, _) in zip(sample["arguments"], sample["filtered_resps"], strict=True):
            expected = log_likelihood(model, tokenizer, *request)
            worst = max(worst, abs(told - expected))
            print(f"{told:12.5f} {expected:12.5f} {request!r}")
    print(f"lm-eval: the largest difference from transformers is {worst:.6f}")
    assert worst < TOLERANCE


if __name__ == "__main__":
    main()
