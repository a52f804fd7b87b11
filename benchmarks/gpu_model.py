"""The 8B model of `gpu_step.py`, of random weights, and its steps in float32."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tensorweave.kernels.attention.triton_decode import HeadRotation
from tensorweave.kernels.weights import QuantizedWeight, Weight, quantize_rows

# L layers, R rows of a decode step, T tokens of a prefill step, N heads, K KV heads, X = N + 2 K, H head dim,
# D hidden size, I intermediate width, V vocabulary, P tokens per block
L, N, K, H, D, I, V, P = 32, 32, 8, 128, 4096, 14336, 128256, 32  # noqa: E741
X = N + 2 * K
EPSILON = 1e-5
DEVICE = torch.device("cuda")


@dataclass
class Layer:
    norm: Tensor
    qkv: Weight
    output: Weight
    mlp_norm: Tensor
    gate_up: Weight  # rows alternate gate and up
    down: Weight


@dataclass
class Model:
    layers: list[Layer]
    embedding: Tensor
    norm: Tensor
    head: Tensor
    rotation: HeadRotation

    @property
    def weight_bytes(self) -> int:
        """What a decode step reads: all but the embedding."""
        each = [w for a in self.layers for w in (a.qkv, a.output, a.gate_up, a.down)]
        return sum(w.nbytes for w in [*each, self.head])


def numbers(*shape: int, scale: float = 1.0) -> Tensor:
    return torch.empty(*shape, device=DEVICE, dtype=torch.bfloat16).normal_(std=scale)


def make_model(num_positions: int) -> Model:
    layers = [
        Layer(
            norm=torch.rand(D, device=DEVICE).add(0.5).bfloat16(),
            qkv=numbers(X * H, D, scale=0.02),
            output=numbers(D, N * H, scale=0.02),
            mlp_norm=torch.rand(D, device=DEVICE).add(0.5).bfloat16(),
            gate_up=numbers(2 * I, D, scale=0.02),
            down=numbers(D, I, scale=0.02),
        )
        for _ in range(L)
    ]  # fmt: skip
    frequencies = 500000.0 ** (-torch.arange(0, H, 2, device=DEVICE, dtype=torch.float64) / H)
    angles = torch.outer(torch.arange(num_positions, device=DEVICE, dtype=torch.float64), frequencies)
    table = torch.cat([angles.cos(), angles.sin()], -1).float()
    norm = torch.rand(D, device=DEVICE).add(0.5).bfloat16()
    return Model(layers, numbers(V, D), norm, numbers(V, D, scale=0.02), HeadRotation(table))


def rms_norm(x: Tensor, gain: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPSILON) * gain.float()


def product(x: Tensor, weight: Weight) -> Tensor:
    """x weightᵀ in float32, of rows in 8 bits with a quantized weight."""
    if isinstance(weight, QuantizedWeight):
        values, scales = quantize_rows(x)
        return (values.float() @ weight.values_NK.float().T) * (scales[:, None] * weight.scales_N)
    assert isinstance(weight, Tensor)
    return x @ weight.float().T


def mlp(layer: Layer, x: Tensor) -> Tensor:
    gate, up = product(rms_norm(x, layer.mlp_norm), layer.gate_up).view(len(x), I, 2).unbind(-1)
    return product(F.silu(gate) * up, layer.down)


def rotate(model: Model, heads: Tensor, positions: Tensor) -> Tensor:
    cos, sin = model.rotation.table_LH[positions, None].chunk(2, -1)
    left, right = heads[:, : N + K].chunk(2, -1)
    return torch.cat([torch.cat([left * cos - right * sin, right * cos + left * sin], -1), heads[:, N + K :]], 1)


def reference_decode(model: Model, caches: Tensor, tokens: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
    """Logits of a decode step in float32. The cache's older keys and values are taken as they are."""
    x = model.embedding[tokens].float()
    for i, layer in enumerate(model.layers):
        heads = rotate(model, product(rms_norm(x, layer.norm), layer.qkv).view(-1, X, H), lengths.long() - 1)
        rows = []
        for row, length in enumerate(lengths.tolist()):
            blocks = torch.stack([caches[i][block].float() for block in table[row].tolist()])
            old = blocks.transpose(0, 1).reshape(2 * K, -1, H)[:, : length - 1]
            keys, values = torch.cat([old, heads[row, N:, None]], 1).split(K)
            scores = torch.einsum("kgh,klh->kgl", heads[row, :N].view(K, N // K, H), keys) * H**-0.5
            rows.append((scores.softmax(-1) @ values).reshape(N * H))
        x = x + product(torch.stack(rows), layer.output)
        x = x + mlp(layer, x)
    return rms_norm(x, model.norm) @ model.head.float().T


def reference_prefill(model: Model, tokens: Tensor, num_prompts: int, length: int) -> Tensor:
    """Logits at the last token of each prompt of a prefill step in float32."""
    positions = torch.arange(length, device=DEVICE).repeat(num_prompts)
    x = model.embedding[tokens].float()
    for layer in model.layers:
        heads = rotate(model, product(rms_norm(x, layer.norm), layer.qkv).view(-1, X, H), positions)
        q, k, v = (part.view(num_prompts, length, -1, H).transpose(1, 2) for part in heads.split([N, K, K], 1))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + product(attended.transpose(1, 2).reshape(-1, N * H), layer.output)
        x = x + mlp(layer, x)
    return rms_norm(x[length - 1 :: length], model.norm) @ model.head.float().T
