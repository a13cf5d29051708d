"""The number of pages of the key-value cache that the requests can use."""

from collections.abc import Mapping


def useful_pages(requests: Mapping[int, int], *, slots: int) -> int:
    """Pages that the `slots` longest requests hold at once; `requests` counts them by the pages that they need."""
    total = 0
    for pages, count in sorted(requests.items(), reverse=True):
        in_slots = min(count, slots)
        total, slots = total + in_slots * pages, slots - in_slots
    return total
