"""What a MoE layer adds to the weighted sums of its experts' outputs, and the sums."""

from collections.abc import Sequence
from typing import NamedTuple

from moempi.backend.protocol import Backend
from moempi.backend.values import Array, RmsNorm


class Sums(NamedTuple):
    """Rows (T, D) of the residual stream, and the same rows normalized if a norm was given."""

    rows: Array
    normalized: Array | None = None


class Addends(NamedTuple):
    """Rows (T, D) that are added to the combined outputs: first the shared experts' rows, then the residual.

    `norm` normalizes the sums, if it is given.
    """

    shared: Array | None
    residual: Array | None
    norm: RmsNorm | None = None

    def in_order(self) -> Sequence[Array]:
        """The addends that there are."""
        return [rows for rows in (self.shared, self.residual) if rows is not None]

    def combine(self, backend: Backend, buffer: Array, output_rows: Array, weights: Array) -> Sums:
        """The sums of `Backend.combine`, with these addends, and their norm."""
        if self.norm is None:
            return Sums(backend.combine(buffer, output_rows, weights, self.in_order()))
        return Sums(*backend.combine_rms_norm(buffer, output_rows, weights, self.in_order(), self.norm))


NO_ADDENDS = Addends(None, None)
