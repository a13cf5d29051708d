"""moempi: Mixture-of-Experts inference over MPI, one expert per rank and layer, the same program on CPUs and GPUs.

Shape letters used in every docstring: T rows (tokens) of a step, D model width, H heads, E experts of a layer,
K experts chosen per token, F expert width, L layers, V vocabulary, S sequences of a step, R ranks of a group.
"""

__version__ = "0.1.0"
