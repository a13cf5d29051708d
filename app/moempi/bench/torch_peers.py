"""Torch's counterparts of the parts of a layer on a GPU; they read the memory of the backend's arrays."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from importlib.util import find_spec
from typing import Any

import numpy as np

from moempi.backend.values import Array, Cache
from moempi.bench import peers
from moempi.bench.random_layer import Sizes

Run = Callable[[], Any]
ATTENTION_BACKENDS = {"flash": "FLASH_ATTENTION", "cudnn": "CUDNN_ATTENTION"}
"""Torch's backends of attention, by the names of the table."""


def find_torch() -> Any:
    """The module torch if it can use a GPU, else None."""
    if not peers.has_torch():
        return None
    import torch

    return torch if torch.cuda.is_available() else None


class TorchPeers:
    """Contestants of torch. Each method returns functions by name, none if `torch` is None.

    Inside `on_stream(pointer)` they submit to that CUDA stream.
    """

    def __init__(self, torch: Any) -> None:
        self._torch = torch

    @property
    def available(self) -> bool:
        """Whether there are contestants."""
        return self._torch is not None

    def on_stream(self, pointer: int) -> AbstractContextManager[Any]:
        """Make a CUDA stream, given its address, torch's current one, without recording gradients."""
        torch = self._torch
        if torch is None or not torch.cuda.is_available():
            return nullcontext()
        torch.set_grad_enabled(False)
        stream: AbstractContextManager[Any] = torch.cuda.stream(torch.cuda.ExternalStream(pointer))
        return stream

    def tensor(self, array: Array) -> Any:
        """The same memory as a tensor: bfloat16 from bits, else the array's own type."""
        torch = self._torch
        if array.dtype == np.uint16:
            return torch.from_dlpack(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_dlpack(array)

    def expert(self, x: Array, next_weights: Callable[[], tuple[Any, Any]]) -> dict[str, Run]:
        """An expert on rows x (T, D); `next_weights` returns tensors (2F, D) and (D, F) for each call."""
        if self._torch is None:
            return {}
        rows, silu = self.tensor(x), self._torch.nn.functional.silu

        def apply() -> Any:
            gate_up, down = next_weights()
            gate, up = (rows @ gate_up.T).chunk(2, dim=1)
            return (silu(gate) * up) @ down.T

        return {"torch": apply}

    def pack(self, x: Array, order: Array) -> dict[str, Run]:
        """x[order]."""
        if self._torch is None:
            return {}
        rows, index = self.tensor(x), self.tensor(order).long()
        return {"torch": lambda: rows.index_select(0, index)}

    def combine(self, buffer: Array, output_rows: Array, weights: Array) -> dict[str, Run]:
        """The weighted sum of buffer[output_rows] (T, K) over K."""
        if self._torch is None:
            return {}
        rows, index = self.tensor(buffer), self.tensor(output_rows).long().reshape(-1)
        factors = self.tensor(weights).to(rows.dtype)[:, :, None]
        shape = (*output_rows.shape, buffer.shape[1])
        return {"torch": lambda: (rows.index_select(0, index).view(shape) * factors).sum(1)}

    def rms_norm(self, x: Array, weight: Array, *, eps: float) -> dict[str, Run]:
        """The root mean square norm of x."""
        if self._torch is None:
            return {}
        rows, factors = self.tensor(x), self.tensor(weight)
        return {"torch": lambda: self._torch.nn.functional.rms_norm(rows, factors.shape, factors, eps)}

    def add(self, x: Array, y: Array) -> dict[str, Run]:
        """The sum of x and y."""
        if self._torch is None:
            return {}
        first, second = self.tensor(x), self.tensor(y)
        return {"torch": lambda: first + second}

    def swiglu(self, gate_up: Array) -> dict[str, Run]:
        """silu(gate) * up."""
        if self._torch is None:
            return {}
        gate, up = self.tensor(gate_up).chunk(2, dim=1)
        return {"torch": lambda: self._torch.nn.functional.silu(gate) * up}

    def choose_experts(self, logits: Array, top_k: int) -> dict[str, Run]:
        """The top_k of the softmax."""
        if self._torch is None:
            return {}
        numbers = self.tensor(logits)
        return {"torch": lambda: self._torch.topk(self._torch.softmax(numbers, dim=-1), top_k)}

    def group(self, experts: Array) -> dict[str, Run]:
        """The choices sorted by expert."""
        if self._torch is None:
            return {}
        choices = self.tensor(experts).reshape(-1)
        return {"torch": lambda: self._torch.sort(choices, stable=True)}

    def attention(self, queries: Array, cache: Cache, *, sequences: int, context: int, scale: float) -> dict[str, Run]:
        """Attention of queries (T, H, dim) over the first `context` positions of each sequence -> (T, H, dim).

        The pages of the cache are in the order of the sequences. A sequence has one query, which attends to all
        positions, or `context` queries, which are causal.
        """
        if self._torch is None:
            return {}
        rows, heads, dim = queries.shape

        def by_head(array: Array) -> Any:
            return self.tensor(array).view(sequences, -1, heads, dim)[:, :context].transpose(1, 2)

        q, k, v = by_head(queries), by_head(cache.keys), by_head(cache.values)
        causal = rows > sequences
        from torch.nn.attention import SDPBackend, sdpa_kernel

        def apply(backend: Any) -> Any:
            with sdpa_kernel(backend):
                attended = self._torch.nn.functional.scaled_dot_product_attention(
                    q, k, v, is_causal=causal, scale=scale
                )
            return attended.transpose(1, 2).reshape(rows, heads, dim)

        return {
            f"torch {name}": partial(apply, getattr(SDPBackend, member)) for name, member in ATTENTION_BACKENDS.items()
        }

    def moe_block(self, sizes: Sizes, x: Array, router: Array, gate_up: Array, down: Array) -> dict[str, Run]:
        """Transformers' Qwen3-MoE block with these weights (E, D), (E, 2F, D), (E, D, F) on rows x (T, D)."""
        if self._torch is None or find_spec("transformers") is None:
            return {}
        torch = self._torch
        with torch.device("meta"):
            config, block = peers.make_moe_block(sizes)
        held = {"gate.weight": router, "experts.gate_up_proj": gate_up, "experts.down_proj": down}
        for name, array in held.items():
            owner, _, attribute = name.partition(".")
            parameter = torch.nn.Parameter(self.tensor(array), requires_grad=False)
            setattr(block.get_submodule(owner), attribute, parameter)
        config._experts_implementation = "grouped_mm"
        rows = self.tensor(x)[None]

        def apply() -> Any:
            with torch.no_grad():
                return block(rows)[0]

        return {"transformers grouped_mm": apply}

    def difference(self, ours: Array, theirs: Any) -> float:
        """The median over rows of the largest difference in a row, per largest value of the row; blocks."""
        mine = self.tensor(ours).float().reshape(len(ours), -1)
        other = theirs.float().reshape(len(ours), -1)
        relative = (mine - other).abs().amax(1) / other.abs().amax(1).clamp(min=1e-9)
        return float(relative.nan_to_num(float("inf")).median())

    def free_memory(self) -> None:
        """Return unused memory of torch to the driver."""
        if self._torch is not None:
            self._torch.cuda.empty_cache()
