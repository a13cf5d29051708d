"""Norms, products and elementwise functions of rows: the launches of kernels/norm.cu and kernels/elementwise.cu."""

from math import prod

from moempi.backend.cuda.launches import Launches, extents
from moempi.backend.cuda.products import Matrix, Products
from moempi.backend.values import Array
from moempi.config.architecture import Clamp


class RowVerbs:
    """See `protocol.RowVerbs`."""

    def __init__(self, launches: Launches, products: Products) -> None:
        self._launches = launches
        self._products = products

    def rms_norm(self, x: Array, weight: Array, *, eps: float, rounded: bool = True) -> Array:
        out = self._launches.rows(x.shape)
        self._launches.by_norm("rms_norm", out, x, weight, out, *extents(x), eps, rounded, weight=weight)
        return out

    def add_rms_norm(
        self, x: Array, y: Array, weight: Array, *, eps: float, rounded: bool = True
    ) -> tuple[Array, Array]:
        total, out = self._launches.rows(x.shape), self._launches.rows(x.shape)
        (*_, width, x_stride, _), (*_, y_stride, _) = extents(x), extents(y)
        sizes = (width, x_stride, y_stride, eps, rounded)
        self._launches.by_norm("add_rms_norm", out, x, y, weight, total, out, *sizes, weight=weight)
        return total, out

    def layer_norm(self, x: Array, weight: Array, bias: Array, *, eps: float) -> Array:
        out = self._launches.rows(x.shape)
        self._launches.by_vector("norm", "layer_norm", out, x, weight, bias, out, *extents(x), eps)
        return out

    def linear(self, x: Array, matrix: Matrix, bias: Array | None = None) -> Array:
        out = self._launches.rows((len(x), matrix.outputs))
        self._products.biased(x, matrix, bias, out)
        return out

    def linear_heads(self, x: Array, matrices: Array) -> Array:
        out = self._launches.rows((*x.shape[:2], matrices.shape[-1]))
        self._products.by_head(x, matrices, out)
        return out

    def clip(self, x: Array, limit: float) -> Array:
        out = self._launches.rows(x.shape)
        self._launches.by_vector("elementwise", "clip", out, x, out, *extents(x), limit)
        return out

    def join_columns(self, *parts: Array) -> Array:
        width = sum(part.shape[-1] for part in parts)
        out, first = self._launches.rows((*parts[0].shape[:-1], width)), 0
        for part in parts:
            sizes = (*extents(part), first, width)
            self._launches.by_vector("elementwise", "copy_columns", out, part, out, *sizes)
            first += part.shape[-1]
        return out

    def add(self, x: Array, y: Array) -> Array:
        out = self._launches.rows(x.shape)
        self._launches.flat("add", prod(out.shape), x, y, out)
        return out

    def swiglu(self, gate_up: Array, clamp: Clamp | None = None) -> Array:
        hidden = gate_up.shape[1] // 2
        out = self._launches.rows((len(gate_up), hidden))
        alpha, limit = (clamp.alpha, clamp.limit) if clamp else (0.0, 0.0)
        self._launches.by_vector("elementwise", "swiglu", out, gate_up, out, hidden, alpha, limit)
        return out

    def squared_relu(self, x: Array) -> Array:
        out = self._launches.rows(x.shape)
        self._launches.flat("squared_relu", prod(out.shape), x, out)
        return out

    def scale_by_sigmoid(self, x: Array, logits: Array) -> Array:
        out = self._launches.rows(x.shape)
        if logits.shape == x.shape and x.shape[1] > 1:
            self._launches.flat("scale_by_sigmoids", prod(out.shape), x, logits, out)
            return out
        self._launches.by_vector("elementwise", "scale_by_sigmoid", out, x, logits, out, x.shape[1])
        return out
