"""The slow twin: the transformer as its papers state it, one sequence, no cache, no fusion, float32.

It shares only the config reader with the engine; rotation, masks and heads are computed another way.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from tensorweave.workers.models.config import ModelConfig
from tensorweave.workers.models.families.table import load_model_config
from tensorweave.workers.models.rotary import inverse_frequencies


class PlainModel:
    def __init__(self, path: str | Path) -> None:
        self.config: ModelConfig = load_model_config(path)
        self.weights: dict[str, Tensor] = {}
        for file in sorted(Path(path).glob("*.safetensors")):
            self.weights |= {name: tensor.float() for name, tensor in load_file(file).items()}

    @torch.no_grad()
    def greedy(self, prompt: list[int], num_tokens: int) -> list[int]:
        tokens = list(prompt)
        for _ in range(num_tokens):
            tokens.append(int(self.logits(tokens)[-1].argmax()))
        return tokens[len(prompt) :]

    @torch.no_grad()
    def logits(self, tokens: list[int]) -> Tensor:
        config = self.config
        x = self.weights["model.embed_tokens.weight"][tokens]
        for layer in range(config.sizes.num_layers):
            prefix = f"model.layers.{layer}"
            x = x + self._attention(self._norm(x, f"{prefix}.input_layernorm"), layer)
            y = self._norm(x, f"{prefix}.post_attention_layernorm")
            gate = self._linear(y, f"{prefix}.mlp.gate_proj")
            gated = gate * torch.sigmoid(gate) * self._linear(y, f"{prefix}.mlp.up_proj")
            x = x + self._linear(gated, f"{prefix}.mlp.down_proj")
        head = "model.embed_tokens" if config.has_tied_embeddings else "lm_head"
        return self._linear(self._norm(x, "model.norm"), head)

    def _linear(self, x: Tensor, name: str) -> Tensor:
        y = x @ self.weights[f"{name}.weight"].T
        bias = self.weights.get(f"{name}.bias")
        return y if bias is None else y + bias

    def _norm(self, x: Tensor, name: str) -> Tensor:
        rms = (x.pow(2).mean(-1, keepdim=True) + self.config.sizes.norm_epsilon).sqrt()
        return x / rms * self.weights[f"{name}.weight"]

    def _heads(self, x: Tensor, prefix: str, kind: str) -> Tensor:
        y = self._linear(x, f"{prefix}.{kind}_proj").unflatten(-1, (-1, self.config.sizes.head_dim))
        if f"{prefix}.{kind}_norm.weight" in self.weights:
            y = self._norm(y, f"{prefix}.{kind}_norm")
        return y if kind == "v" else self._rotate(y)

    def _rotate(self, x: Tensor) -> Tensor:
        """As complex numbers: the pair (i, i + H/2) turns by position times frequency."""
        angles = (
            torch.arange(x.shape[0])
            .double()
            .outer(inverse_frequencies(self.config.ropes[0], self.config.sizes.head_dim).double())
        )
        turned = torch.complex(*x.double().chunk(2, -1)) * torch.polar(torch.ones_like(angles), angles).unsqueeze(1)
        return (torch.cat([turned.real, turned.imag], -1) * self.config.ropes[0].attention_factor).float()

    def _attention(self, x: Tensor, layer: int) -> Tensor:
        prefix, sizes = f"model.layers.{layer}.self_attn", self.config.sizes
        q, k, v = (self._heads(x, prefix, kind) for kind in "qkv")
        group = sizes.num_heads // sizes.num_kv_heads
        length = x.shape[0]
        window = self.config.windows[layer] or length
        distance = torch.arange(length).unsqueeze(1) - torch.arange(length)
        is_seen = (distance >= 0) & (distance < window)
        heads = []
        for head in range(sizes.num_heads):
            scores = q[:, head] @ k[:, head // group].T / math.sqrt(sizes.head_dim)
            heads.append(torch.softmax(scores.masked_fill(~is_seen, -torch.inf), -1) @ v[:, head // group])
        return self._linear(torch.cat(heads, -1), f"{prefix}.o_proj")
