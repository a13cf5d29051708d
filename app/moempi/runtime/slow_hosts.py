"""Slow hosts: ranks of a slow host compute longer than ranks of other hosts, which wait for them.

On its watchdog's thread, every rank sends to rank 0 the share of the last interval in which it computed. Rank 0
compares the ranks of a group, which take the same steps. Pure, but for clocks and the log.
"""

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, median_low

from msgspec import Struct

INTERVAL_S = 5.0
"""Seconds between two loads of a rank, at least."""
LOADS_PER_S = 100.0
"""Loads that rank 0 receives in a second, at most: of many ranks, each sends one more seldom."""
FACTOR = 1.6
"""A host is slow if its ranks compute this many times as long as those of the median host."""
LEAST_SHARE = 0.5
"""A slow host waits for nobody: its ranks compute for at least this share of the time."""
INTERVALS = 2
"""A host is slow in so many intervals in a row before it is named."""

log = logging.getLogger(__name__)


class Load(Struct, frozen=True):
    """The share of an interval that a rank of `group` computed."""

    group: int
    share: float


class LoadReport:
    """The loads of this rank, one of `size`; `busy_s` returns its seconds of computing since any moment."""

    def __init__(self, busy_s: Callable[[], float], group: int, *, size: int) -> None:
        self._interval_s = max(INTERVAL_S, size / LOADS_PER_S)
        self._busy_s = busy_s
        self._group = group
        self._last = time.monotonic(), busy_s()

    def due(self) -> Load | None:
        """The load of the interval that is over; None within an interval."""
        now, busy_s = time.monotonic(), self._busy_s()
        seconds = now - self._last[0]
        if seconds < self._interval_s:
            return None
        share = (busy_s - self._last[1]) / seconds
        self._last = now, busy_s
        return Load(self._group, share)


class SlowHosts:
    """Finds slow hosts from the loads of all ranks; hosts[rank] is a rank's host. A line of the log names each once."""

    def __init__(self, hosts: Sequence[str]) -> None:
        self.found: tuple[str, ...] = ()
        self._hosts = hosts
        self._loads: dict[int, Load] = {}
        self._in_a_row: dict[str, int] = {}

    def add(self, loads: Mapping[int, Load]) -> None:
        """Take new loads; once there is one of every rank, compare the hosts."""
        self._loads.update(loads)
        if len(self._loads) < len(self._hosts):
            return
        slow = slow_hosts(self._loads, self._hosts)
        self._loads.clear()
        self._in_a_row = {host: self._in_a_row.get(host, 0) + 1 for host in slow}
        for host in slow:
            if self._in_a_row[host] == INTERVALS and host not in self.found:
                self.found += (host,)
                log.warning("%s is slow: its ranks compute %.1f times as long as others'", host, slow[host])


def slow_hosts(loads: Mapping[int, Load], hosts: Sequence[str]) -> dict[str, float]:
    """The slow hosts, and how many times as long as those of the median host of their group their ranks compute."""
    shares: dict[int, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for rank, load in loads.items():
        shares[load.group][hosts[rank]].append(load.share)
    found: dict[str, float] = {}
    for of_group in shares.values():
        means = {host: fmean(of_host) for host, of_host in of_group.items()}
        median = median_low(means.values())
        for host, mean in means.items():
            if mean >= LEAST_SHARE and mean > FACTOR * median:
                found[host] = max(found.get(host, 0.0), mean / max(median, 1e-9))
    return found
