"""The number of pages of the key-value cache that the requests can use."""

from collections.abc import Iterable

from moempi.engine.request import Request
from moempi.layout.memory import pages_for


def useful_pages(requests: Iterable[Request], *, slots: int) -> int:
    """Pages that the `slots` longest unfinished requests hold at once."""
    needed = sorted((pages_for(request.capacity) for request in requests if not request.finish), reverse=True)
    return sum(needed[:slots])
