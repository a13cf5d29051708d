"""The transfers of one lane that are under way, and how long the host waited for them, and what was sent."""

from collections.abc import Callable
from typing import Any

from moempi.backend.protocol import Backend
from moempi.comm.transports.base import MpiRequest, Transfer, Waits
from moempi.comm.transports.counted import Counters, no_counts

WAITS = ("exchange", "pipeline", "idle")


class Transfers:
    """Keeps an eye on transfers. With `overlap` off each is complete before `begin` returns; nothing else changes.

    Some of them may start late where the verbs of `backend` return before they are done; see `once_done`.
    """

    def __init__(self, *, overlap: bool, backend: Backend | None = None) -> None:
        self.waits: Waits = dict.fromkeys(WAITS, 0.0)
        self.counters: Counters = no_counts()
        self.count_mismatch = 0  # planned to be sent minus planned to be received: over all ranks it is 0
        self._overlap = overlap
        self._late = backend if backend is not None and backend.record_event() is not None else None
        self._pending: list[Transfer] = []

    def track(
        self,
        request: MpiRequest,
        outgoing: Any,
        incoming: Any,
        *,
        waiting: str,
        then: Callable[[], None] | None = None,
    ) -> Transfer:
        """Take charge of a request that was just started; its wait counts as `waits[waiting]`. `then`: see Transfer."""
        transfer = self.track_receive(request, incoming, waiting=waiting, outgoing=outgoing)
        transfer.then = then
        if not self._overlap:
            transfer.finish()
        return transfer

    def track_receive(self, request: MpiRequest, incoming: Any, *, waiting: str, outgoing: Any = None) -> Transfer:
        """The same for rows that another stage sends when it can: never blocks."""
        transfer = Transfer(request, outgoing, incoming, self.waits, waiting, self._late)
        self._pending.append(transfer)
        return transfer

    def progress(self) -> None:
        """Let MPI move the rows that are under way; does not block."""
        self._pending = [transfer for transfer in self._pending if not transfer.finished]
        for transfer in self._pending:
            transfer.progress()
