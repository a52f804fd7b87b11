"""lm-evaluation-harness over HTTP: its own `local-completions` and `local-chat-completions` models, its tasks and ours.

Only `tensorweave eval` imports this module: it needs lm-eval.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import httpx
import lm_eval
from lm_eval.tasks import TaskManager
from lm_eval.utils import make_table

from tensorweave.cli.chat import first_model
from tensorweave.cli.own_service import service_config

_OUR_TASKS: Final = Path(__file__).with_name("eval_tasks")
_ASK_TIMEOUT_S: Final = 30.0


def evaluate(args: argparse.Namespace, url: str, headers: dict[str, str]) -> dict[str, Any]:
    """lm-eval's results. Raises ValueError for tasks that nobody has."""
    manager, names = find_tasks(args.tasks)
    results: dict[str, Any] | None = lm_eval.simple_evaluate(
        model="local-chat-completions" if args.chat else "local-completions",
        model_args=model_args(args, url, headers),
        tasks=list(names),
        task_manager=manager,
        num_fewshot=args.num_fewshot,
        limit=args.limit,
        apply_chat_template=args.chat,
        log_samples=args.json is not None,
        bootstrap_iters=1000,
    )
    assert results is not None, "only ranks above 0 have none"
    return results


def table(results: dict[str, Any]) -> str:
    return str(make_table(results))


def find_tasks(asked: Sequence[str]) -> tuple[TaskManager, list[str]]:
    """A folder stands for all tasks in it, a YAML file for its own ones."""
    paths = [path for path in map(Path, asked) if path.is_dir() or path.suffix in (".yaml", ".yml")]
    folders = list(dict.fromkeys(path if path.is_dir() else path.parent for path in paths))
    names = [name for name in asked if Path(name) not in paths]
    for path in paths:
        names += _tasks_in(path)
    local = TaskManager(include_path=[_OUR_TASKS, *folders], include_defaults=False)
    if all(name in local.all_tasks for name in names):
        return local, names
    manager = TaskManager(include_path=[_OUR_TASKS, *folders])
    if missing := [name for name in names if name not in manager.all_tasks]:
        raise ValueError(f"--tasks: there is no task {', '.join(missing)}")
    return manager, names


def _tasks_in(path: Path) -> list[str]:
    if not path.exists():
        raise ValueError(f"--tasks: there is no file {path}")
    if path.is_file():
        named = TaskManager(include_path=[path.parent], include_defaults=False).task_index
        found = [name for name, entry in named.items() if entry.yaml_path and Path(entry.yaml_path).samefile(path)]
    else:
        found = list(TaskManager(include_path=[path], include_defaults=False).all_tasks)
    if not found:
        raise ValueError(f"--tasks: {path} has no task")
    return found


def model_args(args: argparse.Namespace, url: str, headers: dict[str, str]) -> dict[str, Any]:
    with httpx.Client(base_url=url, headers=headers, timeout=_ASK_TIMEOUT_S) as client:
        served = first_model(client)
        cards = client.get("/v1/models").json()["data"]
    model = args.model if args.url is not None and args.model is not None else served
    lengths = [card["max_model_len"] for card in cards if card["id"] == model and card.get("max_model_len")]
    shared = {"model": model, "num_concurrent": args.concurrency, "timeout": args.timeout}
    shared |= {"header": headers} if headers else {}
    if args.chat:
        return {**shared, "base_url": f"{url}/v1/chat/completions"}
    tokenizer = {"tokenizer": args.tokenizer or _own_directory(args), "tokenizer_backend": "huggingface"}
    return {
        **shared,
        **tokenizer,
        "base_url": f"{url}/v1/completions",
        **({"max_length": lengths[0]} if lengths else {}),
    }


def _own_directory(args: argparse.Namespace) -> str:
    from tensorweave.workers.store.model_store import resolve_model

    return str(resolve_model(str(service_config(args).model)))
