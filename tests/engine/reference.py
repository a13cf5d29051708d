"""The twin of a whole model: a slow forward pass in float64, in NumPy alone, with the experts that it is given."""

from contextlib import closing
from typing import NamedTuple

import numpy as np

from moempi.arrays import widen
from moempi.config.tensors import catalogue, layer_path
from moempi.storage.weights import WeightFile


class Forward(NamedTuple):
    """States behind each layer (L, T, D), log-probabilities (T, V), experts and weights of MoE layers (T, M, K)."""

    states: np.ndarray
    logprobs: np.ndarray
    experts: np.ndarray
    weights: np.ndarray


class Reference:
    """The model in a weight file: softmax routers, SwiGLU experts, root mean square norms, no biases."""

    def __init__(self, path):
        with closing(WeightFile.open(path)) as file:
            self.architecture = file.architecture
            read = {tensor.name: file.read(tensor.name) for tensor in catalogue(file.architecture)}
        self.tensors = {
            name: (widen(values) if values.dtype == np.uint16 else values).astype(np.float64)
            for name, values in read.items()
        }

    def forward(self, tokens, given):
        """Compute tokens (T,) with the experts `given` (T, M, K); in rows of -1, the router chooses."""
        x, states = self.tensors["embedding"][tokens], []
        experts, weights = np.zeros_like(given), np.zeros(given.shape)
        for layer in range(self.architecture.num_layers):
            path = layer_path(layer)
            x = x + self._attention(f"{path}/attention", self._norm(f"{path}/attention_norm", x))
            rows = self._norm(f"{path}/feed_forward_norm", x)
            if layer in self.architecture.moe_layers:
                number = self.architecture.moe_layers.index(layer)
                for t, row in enumerate(rows):
                    experts[t, number], weights[t, number] = self._route(path, row, given[t, number])
                    x[t] += self._experts(path, row, experts[t, number], weights[t, number])
            else:
                x = x + np.stack([self._network(f"{path}/dense", row) for row in rows])
            states.append(x)
        logits = self._norm("norm", x) @ self.tensors["head"].T
        logprobs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        return Forward(np.stack(states), logprobs, experts, weights)

    def _norm(self, name, x):
        scale = np.sqrt((x**2).mean(axis=1, keepdims=True) + self.architecture.norm_eps)
        return x / scale * self.tensors[name]

    def _attention(self, path, rows):
        shape = self.architecture.attention
        queries, keys, values = ((rows @ self.tensors[f"{path}/{name}"].T) for name in ("q", "k", "v"))
        out = np.zeros_like(queries)
        for head in range(shape.num_heads):
            own = slice(head * shape.head_dim, (head + 1) * shape.head_dim)
            of_key = head * shape.num_kv_heads // shape.num_heads * shape.head_dim
            shared = slice(of_key, of_key + shape.head_dim)
            turned = [self._rotated(rows[:, part]) for rows, part in ((queries, own), (keys, shared))]
            for t in range(len(rows)):
                scores = turned[1][: t + 1] @ turned[0][t] / np.sqrt(shape.head_dim)
                out[t, own] = _softmax(scores) @ values[: t + 1, shared]
        return out @ self.tensors[f"{path}/o"]

    def _rotated(self, rows):
        half, theta = rows.shape[1] // 2, self.architecture.attention.rope.theta
        angles = np.arange(len(rows))[:, None] * theta ** (-np.arange(half) / half)
        turned = (rows[:, :half] + 1j * rows[:, half:]) * np.exp(1j * angles)
        return np.concatenate([turned.real, turned.imag], axis=1)

    def _route(self, path, row, given):
        router = self.architecture.experts.router
        scores = _softmax(self.tensors[f"{path}/router"] @ row)
        chosen = np.argsort(-scores, kind="stable")[: router.top_k] if (given == -1).all() else given
        weights = scores[chosen]
        return chosen, weights / weights.sum() if router.renormalize else weights

    def _experts(self, path, row, experts, weights):
        total = self._network(f"{path}/shared", row) if self.architecture.experts.shared_width else np.zeros(len(row))
        for expert, weight in zip(experts, weights, strict=True):
            gate, up, down = (self.tensors[f"{path}/experts/{name}"][expert] for name in ("gate", "up", "down"))
            total = total + weight * (down @ _swiglu(gate @ row, up @ row))
        return total

    def _network(self, path, row):
        gate, up, down = (self.tensors[f"{path}/{name}"] for name in ("gate", "up", "down"))
        return _swiglu(gate @ row, up @ row) @ down


def _swiglu(gate, up):
    return gate / (1 + np.exp(-gate)) * up


def _softmax(logits):
    powers = np.exp(logits - logits.max())
    return powers / powers.sum()
