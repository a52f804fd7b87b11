"""A mistake in a service's file is reported once, at the key itself, with the name that was meant."""

from __future__ import annotations

from pathlib import Path

import pytest

from tensorweave.deploy.config import ConfigError, load_config

BEGINNING = "model: some-model\npools:\n  prefill: {}\n  decode: {}\n"


def told(tmp_path: Path, text: str) -> str:
    path = tmp_path / "s.yaml"
    path.write_text(BEGINNING + text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    return str(caught.value).replace(f"{path}:", "s.yaml:")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (
            "engine:\n  torch_compile_config: {}\n",
            "s.yaml:6: engine.torch_compile_config = {}: is not supported yet: our kernels are fused already; "
            "torch.compile is not used",
        ),
        (
            "engine:\n  kv_cache_config:\n    use_uvm: true\n",
            "s.yaml:7: engine.kv_cache_config.use_uvm = True: is not supported yet: the cache is in the device's own "
            "memory",
        ),
        ("limits:\n  max_queued: yes\n", "s.yaml:6: limits.max_queued = True: is no number"),
        ("limits:\n  request_timeout_s: off\n", "s.yaml:6: limits.request_timeout_s = False: is no number"),
        (
            "engine: {max_seq_len: true}\n",
            "s.yaml:5: engine.max_seq_len = True: is no number",
        ),
    ],
)
def test_a_mistake_is_told_where_it_stands(tmp_path: Path, text: str, line: str) -> None:
    assert told(tmp_path, text) == line


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("engine: {enable_block_reuse: false}\n", "kv_cache_config.enable_block_reuse"),
        ("engine: {max_tokens: 100}\n", "kv_cache_config.max_tokens"),
        ("engine: {capacity_scheduler_policy: STATIC_BATCH}\n", "scheduler_config.capacity_scheduler_policy"),
        ("engine: {kv_lease_timeout_ms: 100}\n", "cache_transceiver_config.kv_lease_timeout_ms"),
        ("engine: {max_batchsize: 100}\n", "max_batch_size"),
        ("max_batch_size: 100\n", "engine.max_batch_size"),
        ("port: 9000\n", "router.port"),
        ("drain_timeout_s: 9\n", "limits.drain_timeout_s"),
        ("routr: {}\n", "router"),
    ],
)
def test_what_was_meant_is_named_with_its_group(tmp_path: Path, text: str, meant: str) -> None:
    assert told(tmp_path, text).endswith(f"; did you mean {meant!r}?")
