"""Writes the API page from docstrings, fields and statuses: `python -m tensorweave.llmapi.reference docs/llm_api.md`.

A test compares the page in docs/ with what this writes, so it is never out of date.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from tensorweave.cluster.cache_transceiver_config import CacheTransceiverConfig
from tensorweave.cluster.cuda_graph_config import CudaGraphConfig
from tensorweave.cluster.kv_cache_config import KvCacheConfig
from tensorweave.cluster.llm_args import TorchLlmArgs
from tensorweave.cluster.lora_config import LoraConfig
from tensorweave.cluster.moe_config import MoeConfig
from tensorweave.cluster.quant_config import QuantConfig
from tensorweave.cluster.scheduler_config import SchedulerConfig
from tensorweave.cluster.speculation_config import NGramDecodingConfig, UserProvidedDecodingConfig
from tensorweave.llmapi.api_surface import FACTORY, REQUIRED, Method, Parameter, surface_of
from tensorweave.llmapi.completion_output import CompletionOutput
from tensorweave.llmapi.disaggregated_params import DisaggregatedParams
from tensorweave.llmapi.guided_decoding import GuidedDecodingParams
from tensorweave.llmapi.inputs import PreprocessedInputs
from tensorweave.llmapi.llm import LLM
from tensorweave.llmapi.outputs import RequestOutput
from tensorweave.llmapi.request_types import KvCacheRetentionConfig, SchedulingParams, TokenRangeRetentionConfig
from tensorweave.llmapi.sampling_params import SamplingParams

CLASSES: Final[tuple[type[Any], ...]] = (
    LLM,
    TorchLlmArgs,
    KvCacheConfig,
    LoraConfig,
    SchedulerConfig,
    CudaGraphConfig,
    MoeConfig,
    QuantConfig,
    NGramDecodingConfig,
    UserProvidedDecodingConfig,
    CacheTransceiverConfig,
    SamplingParams,
    GuidedDecodingParams,
    RequestOutput,
    CompletionOutput,
    SchedulingParams,
    KvCacheRetentionConfig,
    TokenRangeRetentionConfig,
    DisaggregatedParams,
    PreprocessedInputs,
)
_INTRODUCTION: Final = """# The Python API

Written by `python -m tensorweave.llmapi.reference docs/llm_api.md` from docstrings and fields; edit those.

Everything here is imported from `tensorweave`. What has no status is committed: it changes only with a new major
version. A *beta* or *prototype* may change between releases; what is *deprecated* will be removed. `LLM(...)` takes
every field of `TorchLlmArgs` (also called `LlmArgs`), and a service's YAML file takes them under `engine`.
"""


def render() -> str:
    """The whole page."""
    lines = [_INTRODUCTION, *(f"- [{cls.__name__}](#{cls.__name__.lower()})" for cls in CLASSES), ""]
    for cls in CLASSES:
        lines += _class_lines(cls)
    return "\n".join(lines).rstrip() + "\n"


def _class_lines(cls: type[Any]) -> Iterator[str]:
    surface = surface_of(cls)
    yield from (f"## {surface.name}", "", surface.doc.text, "")
    if init := surface.methods.get("__init__"):
        yield from _table(init.parameters)
    yield from _table({**surface.fields, **surface.properties})
    for error, text in surface.doc.raises.items():
        yield from (f"Raises `{error}`: {text}", "")
    for name, method in surface.methods.items():
        if name != "__init__":
            yield from _method_lines(surface.name, name, method)


def _method_lines(class_name: str, name: str, method: Method) -> Iterator[str]:
    status = f" ({method.status})" if method.status else ""
    yield from (f"### {class_name}.{name}{status}", "", method.doc.text, "")
    yield from _table(method.parameters)
    if method.doc.returns:
        yield from (f"Returns `{method.returns}`: {method.doc.returns}", "")
    for error, text in method.doc.raises.items():
        yield from (f"Raises `{error}`: {text}", "")


def _table(parameters: Mapping[str, Parameter]) -> Iterator[str]:
    if not parameters:
        return
    yield from ("| name | type | default | status | |", "|---|---|---|---|---|")
    for name, parameter in parameters.items():
        cells = (
            f"`{name}`",
            _code(parameter.type),
            _default(parameter.default),
            parameter.status or "",
            parameter.text,
        )
        yield f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |"
    yield ""


def _code(type_: str) -> str:
    return f"<code>{type_.replace('<', '&lt;')}</code>"


def _default(default: Any) -> str:
    if default is REQUIRED:
        return ""
    return "made anew" if default is FACTORY else f"`{default!r}`"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(render(), encoding="utf-8")
