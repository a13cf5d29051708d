"""The norm before attention, feed-forward and head."""

from typing import Literal

from msgspec import Struct

from moempi.backend.protocol import Backend
from moempi.backend.values import Array, RmsNorm


class Norm(Struct, frozen=True):
    """A norm over the width: `kind` as in `config.architecture.Architecture.norm`, with a bias for "layer" only."""

    kind: Literal["rms", "rms_float32", "layer"]
    eps: float
    weight: Array
    bias: Array | None = None

    @property
    def rms(self) -> RmsNorm | None:
        """The same norm of a row as one vector; None if it is another kind."""
        return None if self.kind == "layer" else RmsNorm(self.weight, self.eps, self.kind == "rms")

    def __call__(self, backend: Backend, x: Array) -> Array:
        """Normalize rows x (T, D)."""
        if self.kind == "layer":
            return backend.layer_norm(x, self.weight, self.bias, eps=self.eps)
        return backend.rms_norm(x, self.weight, eps=self.eps, rounded=self.kind == "rms")

    def of_sum(self, backend: Backend, x: Array, y: Array) -> tuple[Array, Array]:
        """Add rows x and y (T, D); the sum, and the sum normalized."""
        if self.kind == "layer":
            total = backend.add(x, y)
            return total, self(backend, total)
        return backend.add_rms_norm(x, y, self.weight, eps=self.eps, rounded=self.kind == "rms")
