"""The experts of a layer: all experts with few rows in two launches, each expert with many rows by its own products."""

from collections.abc import Sequence

from moempi.arrays import IntArray
from moempi.backend.cuda.few_rows import ExpertRows, FewRows, expert_rows
from moempi.backend.cuda.launches import Launches, rows_from
from moempi.backend.cuda.products import Products
from moempi.backend.cuda.rows import RowVerbs
from moempi.backend.values import Array, Expert


class ExpertMlps:
    """The networks of experts; with `reproducible`, a row's bits do not depend on how many rows its expert has."""

    def __init__(self, launches: Launches, rows: RowVerbs, products: Products, *, reproducible: bool) -> None:
        self._launches, self._rows, self._products = launches, rows, products
        self._few_rows = FewRows(launches, always=reproducible)

    def compute(self, rows: Array, experts: Sequence[Expert], counts: IntArray, out: Array | None) -> Array:
        """The outputs (T, D) of rows (T, D), in `out` if it is given; see `protocol.ExpertVerbs.expert_mlp`."""
        outputs, few = self._launches.rows(rows.shape) if out is None else out, []
        for own in expert_rows(experts, counts.tolist()):
            if self._few_rows.takes(own):
                few.append(own)
            else:
                self._of_many(rows, own, outputs)
        self._few_rows.expert_mlps(rows, few, outputs)
        return outputs

    def _of_many(self, rows: Array, own: ExpertRows, outputs: Array) -> None:
        x, out = (rows_from(whole, own.first, own.num_rows) for whole in (rows, outputs))
        expert, verbs = own.expert, self._rows
        hidden = verbs.linear(x, expert.gate_up, expert.gate_up_bias)
        hidden = verbs.swiglu(hidden, expert.clamp) if expert.gated else verbs.squared_relu(hidden)
        self._products.biased(hidden, expert.down, expert.down_bias, out)
