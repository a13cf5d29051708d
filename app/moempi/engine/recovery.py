"""Recovery: the time from the loss of a host in one attempt at a job to the first new token of the next one."""

import os
import time
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Self

from moempi.errors import MoempiError
from moempi.observe.progress import Counts
from moempi.storage.journal import journal_paths
from moempi.storage.run_state import Loss, read_state, state_path

LOST_HOSTS = "MOEMPI_LOST_HOSTS"


@dataclass(slots=True)
class Recovery:
    """The recovery from a loss that ended the attempt before; times are seconds since the epoch."""

    loss: Loss
    started_at: float = field(default_factory=time.time)
    loaded_at: float = 0.0
    token_at: float = 0.0

    @classmethod
    def from_state(cls, results: str) -> Self | None:
        """The recovery that begins now if the last run of a job ended by the loss of a host, else None."""
        try:
            loss = read_state(results).loss or _loss_without_words(results)
        except MoempiError:
            return None
        return None if loss is None else cls(loss)

    def is_over(self, counts: Counts) -> bool:
        """Whether there is a new token, given the counts before each step."""
        self.loaded_at = self.loaded_at or time.time()
        if counts.generated or counts.tokens:
            self.token_at = time.time()
        return bool(self.token_at)

    def text(self) -> str:
        """One line that says how long each part took."""
        times = (self.loss.progress_at, self.loss.noticed_at, self.started_at, self.loaded_at, self.token_at)
        found, relaunched, loaded, stepped = (end - begin for begin, end in pairwise(times))
        return (
            f"recovered from the loss of {', '.join(self.loss.hosts)}: {times[-1] - times[0]:.1f} s from the last "
            f"progress to the first new token ({found:.1f} until noticed, {relaunched:.1f} until the ranks started "
            f"again, {loaded:.1f} loading, {stepped:.1f} first steps)"
        )


def _loss_without_words(results: str) -> Loss | None:
    """The loss of hosts that a batch script found after all ranks were killed: `HOST,...@TIME` in LOST_HOSTS."""
    hosts, _, noticed_at = os.environ.get(LOST_HOSTS, "").partition("@")
    if not hosts:
        return None
    with suppress(OSError, ValueError):
        last_signs = [path.stat().st_mtime for path in (state_path(results), *journal_paths(results))]
        return Loss(tuple(hosts.split(",")), max(last_signs), float(noticed_at))
    return None
