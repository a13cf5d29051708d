"""The levels of links that rows pass, by where the ranks stand. Pure."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.integer]

SELF, NODE, NETWORK = range(3)
LEVELS = ("self", "node", "network")


def link_levels(nodes: Sequence[int], rank: int) -> IntArray:
    """The level of the link from `rank` to each rank, an index into LEVELS (R,), given every rank's node."""
    levels = np.where(np.asarray(nodes) == nodes[rank], NODE, NETWORK)
    levels[rank] = SELF
    return levels
