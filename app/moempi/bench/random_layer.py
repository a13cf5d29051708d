"""A Mixture-of-Experts layer with random weights, equal for any number of ranks, and random rows."""

from argparse import ArgumentParser, Namespace
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from moempi.arrays import Bits, Float32Array, narrow, round_to_bfloat16
from moempi.backend.protocol import Backend
from moempi.backend.values import Expert
from moempi.comm.exchange import OneHop
from moempi.comm.hop import Hop
from moempi.comm.transfers import Waits
from moempi.commands.flags import count
from moempi.config.architecture import Router
from moempi.layout.placement import Placement
from moempi.layout.topology import Topology
from moempi.model.feed_forward import MixtureOfExperts

T = TypeVar("T")
WEIGHT_DEVIATION = 0.03
"""Standard deviation of the weights."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """The sizes of a layer: width D, expert width F, E experts, K chosen per token."""

    width: int
    expert_width: int
    num_experts: int
    top_k: int

    @classmethod
    def of(cls, chosen: Namespace) -> "Sizes":
        """The sizes given by the flags of `add_size_flags`."""
        return cls(chosen.width, chosen.expert_width, chosen.experts, chosen.top_k)


def add_size_flags(parser: ArgumentParser) -> None:
    """Add flags for the sizes; the defaults are the sizes of the published figures."""
    parser.add_argument("--width", type=count, default=1024, metavar="D", help="width of a row (1024)")
    parser.add_argument("--expert-width", type=count, default=512, metavar="F", help="hidden width of an expert (512)")
    parser.add_argument("--experts", type=count, default=16, metavar="E", help="number of experts (16)")
    parser.add_argument("--top-k", type=count, default=4, metavar="K", help="experts of a token (4)")


def random_bits(shape: tuple[int, int], *, key: int) -> Bits:
    """A matrix of random bfloat16 weights, a function of shape and key."""
    return narrow(np.random.default_rng(key).standard_normal(shape, np.float32) * np.float32(WEIGHT_DEVIATION))


def router_bits(sizes: Sizes) -> Bits:
    """The router's matrix (E, D)."""
    return random_bits((sizes.num_experts, sizes.width), key=0)


def expert_bits(sizes: Sizes, expert: int) -> tuple[Bits, Bits]:
    """One expert's matrices: gate and up (2F, D), down (D, F)."""
    gate_up = random_bits((2 * sizes.expert_width, sizes.width), key=2 * expert + 1)
    return gate_up, random_bits((sizes.width, sizes.expert_width), key=2 * expert + 2)


def make_layer(sizes: Sizes, backend: Backend, *, hosted: tuple[int, ...]) -> MixtureOfExperts:
    """The layer on the rank that hosts these experts."""
    experts = []
    for expert in hosted:
        gate_up, down = expert_bits(sizes, expert)
        experts.append(Expert(gate_up=backend.matrix(gate_up), down=backend.matrix(down)))
    rule = Router(top_k=sizes.top_k, renormalize=True)
    return MixtureOfExperts(layer=0, rule=rule, router=backend.matrix(router_bits(sizes)), experts=tuple(experts))


def make_exchange(hop: Hop, placement: Placement) -> OneHop:
    """The exchange of one layer in one hop; all ranks count as ranks of one node."""
    return OneHop(hop, {0: placement}, Topology((0,) * hop.comm.size))


def make_rows(num_rows: int, width: int, *, seed: int = 0) -> Float32Array:
    """Random rows (T, D), float32 values that bfloat16 represents exactly."""
    return round_to_bfloat16(np.random.default_rng(seed).standard_normal((num_rows, width), np.float32))


def run_to_end(steps: Waits[T]) -> T:
    """Resume one lane until it returns, and return its value."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            value: T = end.value
            return value
