"""Balanced routing in a run: the routing policies of the lanes, the choices they moved, and the cost in quality."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt
from msgspec import Struct

from moempi.arrays import Float32Array, Float64Array
from moempi.comm.lane_comm import LaneComm
from moempi.config.architecture import Architecture
from moempi.config.job import BalanceSection
from moempi.engine.lane import Lane
from moempi.engine.request import Request
from moempi.engine.tasks import Score
from moempi.model.router_balance import (
    MODEL_ROUTING,
    BiasPolicy,
    CapacityPolicy,
    ExpertBias,
    MoveCounter,
    RoutingPolicy,
)
from moempi.runtime.world import World


class Balance(Struct, frozen=True):
    """The balancing of one rank: a routing policy for each lane; all of them share `moves` and `expert_bias`."""

    policies: Sequence[RoutingPolicy]
    moves: MoveCounter
    expert_bias: ExpertBias

    def asked_load(self, num_layers: int) -> npt.NDArray[np.int64]:
        """The router's own choices on this rank, before any was moved (L, E); zero in the layers of other stages."""
        load = np.zeros((num_layers, self.expert_bias.values.shape[1]), np.int64)
        for layer, counts in self.moves.preferred.items():
            load[layer] = counts
        return load

    def bias_by_layer(self, num_layers: int) -> Float32Array:
        """The expert bias (L, E), equal on all ranks of a stage; zero in the layers of other stages."""
        bias = np.zeros((num_layers, self.expert_bias.values.shape[1]), np.float32)
        bias[list(self.expert_bias.layers)] = self.expert_bias.values
        return bias


def make_balance(
    section: BalanceSection, comms: Sequence[LaneComm], architecture: Architecture, layers: range
) -> Balance | None:
    """The balancing of the lanes with these `comms`, which compute `layers`; None if it is off."""
    if section.mode == "off":
        return None
    moe_layers = [layer for layer in architecture.moe_layers if layer in layers]
    moves = MoveCounter(moe_layers, architecture.experts.num)
    bias = ExpertBias(moe_layers, architecture.experts.num, rate=section.rate, bound=section.bound)
    policies: list[RoutingPolicy] = []
    for comm in comms:
        if not moe_layers:
            policies.append(MODEL_ROUTING)
        elif section.mode == "bias":
            policies.append(BiasPolicy(comm.stage, bias, moves))
        else:
            policies.append(CapacityPolicy(comm.stage, moves, factor=section.capacity))
    return Balance(policies, moves, bias)


def quality_cost(
    lanes: Sequence[Lane],
    requests: Sequence[Request],
    world: World,
    *,
    sample: int,
    run: Callable[[Sequence[Lane]], object],
) -> float:
    """Mean change of a token's log-probability by the lanes' policies: requests are scored with and without them.

    About `sample` of the finished `requests` are scored, which the ranks of the first stage hold. The mean is over
    their generated tokens, or the prompt's tokens if none were generated; NaN if no request was scored both ways.
    `run` interleaves lanes until they have no steps left. Collective, blocks.
    """
    finished = [request for request in requests if request.finish in ("stop", "length")]
    share = -(-sample // max(world.comm.allreduce(int(bool(finished))), 1))
    with_policy = [_scoring(lane) for lane in lanes]
    without = [replace(lane, policy=MODEL_ROUTING) for lane in with_policy]
    scores = [_scores(scoring, finished[:share], run) for scoring in (with_policy, without)]
    changes = [balanced - plain for balanced, plain in zip(*scores, strict=True) if len(balanced) == len(plain)]
    change, tokens = sum(float(of_request.sum()) for of_request in changes), sum(map(len, changes))
    change, tokens = world.comm.allreduce(np.array([change, tokens])).tolist()
    return change / tokens if tokens else float("nan")


def _scoring(lane: Lane) -> Lane:
    """The same lane with the score task; it records nothing."""
    context = replace(lane.context, task=Score(), recorder=lane.context.recorder.muted())
    return replace(lane, context=context, trace=None)


def _scores(
    lanes: Sequence[Lane], requests: Sequence[Request], run: Callable[[Sequence[Lane]], object]
) -> list[Float64Array]:
    """Log-probabilities of each request's tokens; empty for a request that a stop of the run left unfinished."""
    again = [Request(request.prompt, request.all_tokens, limit=0) for request in requests]
    lanes[0].context.scheduler.submit(again, count=len(again))
    run(lanes)
    scores = []
    for request, scored in zip(requests, again, strict=True):
        sampled = scored.sampled if scored.finish == "length" else []
        logprobs = np.concatenate([np.zeros(0), *(chunk.logprobs for chunk in sampled)])
        scores.append(logprobs[-len(request.tokens) :] if request.tokens else logprobs)
    return scores
