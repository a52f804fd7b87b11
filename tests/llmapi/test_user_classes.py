"""A user's scheduler and KV cache manager, as the two pages in docs/ show them, in the real executor."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tensorweave import LLM, KvCacheConfig, SamplingParams
from tests.workers.tiny_models import make_model

DOCS = Path(__file__).parents[2] / "docs"
PROMPTS = [[7] * 90, [9, 8, 7] * 20, [5], list(range(3, 120)), [9, 8, 7] * 20]
PARAMS = SamplingParams(max_tokens=20, ignore_eos=True)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    make_model("llama", path)
    return path


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """The pages' code blocks as files, each under the name in its first line; gives 'module:Class' by class."""
    found = {}
    for page in ("scheduler.md", "kv_cache_manager.md"):
        for block in re.findall(r"^```python\n(.*?)^```$", (DOCS / page).read_text(), re.MULTILINE | re.DOTALL):
            name = re.match(r"# (\w+)\.py", block)
            assert name, f"{page}: a code block does not name its file"
            (tmp_path / f"{name[1]}.py").write_text(block)
            found |= {cls: f"{name[1]}:{cls}" for cls in re.findall(r"^class (\w+)", block, re.MULTILINE)}
    monkeypatch.syspath_prepend(str(tmp_path))
    yield found
    for path in found.values():
        sys.modules.pop(path.partition(":")[0], None)


def run(model: Path, **knobs: str) -> list[list[int]]:
    with LLM(
        model,
        skip_tokenizer_init=True,
        dtype="float32",
        kv_cache_config=KvCacheConfig(max_tokens=4096),
        max_num_tokens=64,
        **knobs,
    ) as llm:
        outputs = llm.generate(PROMPTS, PARAMS, use_tqdm=False)
        assert isinstance(outputs, list)
        return [output.outputs[0].token_ids for output in outputs]


@pytest.mark.parametrize(
    ("knob", "name"),
    [
        ("scheduler", "ShortestPromptFirst"),
        ("scheduler", "ReserveAll"),
        ("kv_cache_manager", "KeepPrompts"),
        ("kv_cache_manager", "PlainKVCache"),
    ],
)
def test_own_parts_serve_the_same_tokens(model: Path, modules: dict[str, str], knob: str, name: str) -> None:
    assert run(model, **{knob: modules[name]}) == run(model)


@pytest.mark.parametrize("path", ["nowhere:Class", "json:Nothing", "json", "json:dumps"])
def test_a_wrong_path_is_refused_by_name(model: Path, path: str) -> None:
    with pytest.raises(ValueError, match="scheduler"):
        run(model, scheduler=path)
