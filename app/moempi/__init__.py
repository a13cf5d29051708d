"""moempi: inference of Mixture-of-Experts language models over MPI, the same program on CPUs and GPUs.

Shape letters in docstrings: T tokens (rows) of a step, D model width, H attention heads, E experts of a layer, K
experts chosen per token, F expert width, L layers, V vocabulary size, R ranks of a communicator, P physical experts of
a layer (every replica of an expert is one), N rows that need logits.

A lane is a slot of a stage in which micro-batches follow each other, with communicators and buffers of its own. A stage
has several lanes, so that one computes while the rows of others are on the network.
"""

__version__ = "0.1.0"
