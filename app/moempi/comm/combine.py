"""The end of a MoE layer: its experts' outputs return to the rank that holds the token and are added up there."""

from typing import Any, Protocol

from moempi.backend.values import Array
from moempi.comm.addends import Addends, Sums
from moempi.comm.exchange import Exchange
from moempi.comm.transfers import Waits


class Combine(Protocol):
    """The end of a MoE layer. Both calls are collective over the ranks of the stage; `plan` is the dispatch's."""

    def begin(self, plan: Any, addends: Addends) -> Array | None:
        """Send what does not depend on the outputs, before the experts compute; does not block on other ranks' rows.

        Returns the buffer for the outputs that `finish` sends; None if they may be anywhere.
        """

    def finish(self, outputs: Array, plan: Any, addends: Addends) -> Waits[Sums]:
        """Send the experts' outputs, in expert order, to the ranks that add them up; the sums that this rank holds."""


class HomeCombine:
    """The outputs return to the home rank, which holds the token."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange

    def begin(self, plan: Any, addends: Addends) -> Array | None:
        """Send nothing: the home rank has the addends."""
        return self._exchange.outputs_buffer(plan)

    def finish(self, outputs: Array, plan: Any, addends: Addends) -> Waits[Sums]:
        """Combine the outputs, then add the shared experts' rows, then the residual, then normalize the sums."""
        return (yield from self._exchange.combine(outputs, plan, addends))
