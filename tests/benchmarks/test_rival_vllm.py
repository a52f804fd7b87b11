"""What `benchmarks/rival_vllm.py` accepts as the quantization that was asked for."""

from __future__ import annotations

import pytest

from benchmarks.rival_vllm import check_methods, methods_of

LAYERS = """LlamaForCausalLM(
  (model): LlamaModel(
    (embed_tokens): VocabParallelEmbedding(num_embeddings=128256)
    (layers): ModuleList(
      (0-31): 32 x LlamaDecoderLayer(
        (self_attn): LlamaAttention(
          (qkv_proj): QKVParallelLinear(quant=METHOD, in_features=4096, output_features=6144, bias=False)
          (o_proj): RowParallelLinear(quant=METHOD, in_features=4096, output_features=4096, bias=False)
        )
        (mlp): LlamaMLP(
          (gate_up_proj): MergedColumnParallelLinear(quant=METHOD, in_features=4096, output_features=28672)
          (down_proj): RowParallelLinear(LAST, in_features=14336, output_features=4096, bias=False)
        )
      )
    )
  )
  (lm_head): ParallelLMHead(num_embeddings=128256)
)"""


def layers_of(method: str | None, last: str | None) -> str:
    layers = LAYERS.replace("quant=METHOD, ", f"quant={method}, " if method else "")
    return layers.replace("LAST, ", f"quant={last}, " if last else "")


@pytest.mark.parametrize(
    ("method", "quantization"),
    [
        (None, "none"), ("AutoGPTQLinearMethod", "w4a16"), ("CompressedTensorsWNA16", "w4a16"),
        ("Fp8PerTensorOnlineLinearMethod", "fp8"),
    ],
)  # fmt: skip
def test_all_products_are_computed_as_asked(method: str | None, quantization: str) -> None:
    methods = methods_of(layers_of(method, method))
    assert methods == [method or "16 bits"]
    check_methods(methods, quantization)
    for other in {"none", "fp8", "w4a16"} - {quantization}:
        with pytest.raises(SystemExit, match=other):
            check_methods(methods, other)


@pytest.mark.parametrize("last", [None, "Fp8LinearMethod"])
def test_one_product_that_is_computed_otherwise_is_an_error(last: str | None) -> None:
    methods = methods_of(layers_of("AutoGPTQLinearMethod", last))
    assert len(methods) == 2
    with pytest.raises(SystemExit, match="w4a16"):
        check_methods(methods, "w4a16")


def test_a_description_without_products_is_an_error() -> None:
    with pytest.raises(SystemExit, match="none"):
        check_methods(methods_of("Model()"), "none")
