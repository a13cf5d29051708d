"""What a MoE layer does with its experts' outputs: here, add them up for the tokens of this rank."""

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, Protocol

from moempi.backend.protocol import Array, Backend
from moempi.comm.exchange import Exchange
from moempi.layout.schedule import Point


@dataclass(frozen=True, slots=True)
class Addends:
    """Rows (T, D) that the combined outputs are added to: of the shared experts first, then the residual."""

    shared: Array | None
    residual: Array | None


class Combine(Protocol):
    """The end of a MoE layer; both calls are collective over the ranks of the stage."""

    def begin(self, plan: Any, addends: Addends) -> None:
        """Called once the plan is made, before the experts compute; does not block on other ranks' rows."""

    def finish(self, outputs: Array, plan: Any, addends: Addends) -> Generator[Point, None, Array]:
        """Send the experts' outputs, in expert order, to where they are added up; the rows of this rank after that."""


class HomeCombine:
    """The outputs return to the rank that holds the token."""

    def __init__(self, exchange: Exchange, backend: Backend) -> None:
        self._exchange = exchange
        self._backend = backend

    def begin(self, plan: Any, addends: Addends) -> None:
        """Nothing to send ahead of the outputs."""

    def finish(self, outputs: Array, plan: Any, addends: Addends) -> Generator[Point, None, Array]:
        """Combine the outputs, then add the shared experts' rows, then the residual."""
        rows = yield from self._exchange.combine(outputs, plan)
        if addends.shared is not None:
            rows = self._backend.add(rows, addends.shared)
        return rows if addends.residual is None else self._backend.add(addends.residual, rows)
