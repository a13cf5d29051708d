"""Balanced gating in a run: a gating for each lane, what they did, and what it cost in quality."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from moempi.comm.lane_comm import LaneComm
from moempi.config.architecture import Architecture
from moempi.config.job import BalanceSection
from moempi.engine.lane import Lane
from moempi.engine.request import Request as Request
from moempi.engine.tasks import Score
from moempi.model.kv_cache import pages_for
from moempi.model.router_balance import (
    MODEL_ROUTING,
    BiasPolicy,
    CapacityPolicy,
    ExpertBias,
    MoveCounter,
    RoutingPolicy,
)
from moempi.runtime.world import World


@dataclass(frozen=True, slots=True)
class Balance:
    """The balancing of one rank: a gating for each of its lanes, which share the tally and the shifts."""

    policies: Sequence[RoutingPolicy]
    moves: MoveCounter
    expert_bias: ExpertBias

    def asked_load(self, num_layers: int) -> npt.NDArray[np.int64]:
        """The choices that the router asked for on this rank (L, E); zero in the layers of other stages."""
        load = np.zeros((num_layers, self.expert_bias.values.shape[1]), np.int64)
        for layer, counts in self.moves.preferred.items():
            load[layer] = counts
        return load

    def bias_by_layer(self, num_layers: int) -> npt.NDArray[np.float32]:
        """The shifts as they are now (L, E), equal on all ranks of a stage; zero in the layers of other stages."""
        terms = np.zeros((num_layers, self.expert_bias.values.shape[1]), np.float32)
        terms[list(self.expert_bias.layers)] = self.expert_bias.values
        return terms


def make_balance(
    rules: BalanceSection, comms: Sequence[LaneComm], architecture: Architecture, layers: range
) -> Balance | None:
    """What balances the lanes of these networks, which compute `layers`; None where nothing does."""
    balanced = [layer for layer in architecture.moe_layers if layer in layers]
    if rules.mode == "off":
        return None
    moves = MoveCounter(balanced, architecture.experts.num)
    bias = ExpertBias(balanced, architecture.experts.num, rate=rules.rate, bound=rules.bound)
    policies: list[RoutingPolicy] = []
    for comm in comms:
        if not balanced:
            policies.append(MODEL_ROUTING)
        elif rules.mode == "bias":
            policies.append(BiasPolicy(comm.stage, bias, moves))
        else:
            policies.append(CapacityPolicy(comm.stage, moves, factor=rules.capacity))
    return Balance(policies, moves, bias)


def quality_cost(
    lanes: Sequence[Lane],
    requests: Sequence[Request],
    world: World,
    *,
    sample: int,
    run: Callable[[Sequence[Lane]], object],
) -> float:
    """Mean change of a token's log-probability by the lanes' gating, on `sample` requests scored with and without it.

    Tokens are those that were generated, or else those of the prompt. Collective, blocks; the ranks of the first stage
    bring their `requests`, of which finished ones are taken that fit in the cache as before. NaN where none was scored
    both ways.
    """
    finished = [request for request in requests if request.finish in ("stop", "length") and _fits_again(request)]
    share = -(-sample // max(world.comm.allreduce(int(bool(finished))), 1))
    balanced = [_muted(lane) for lane in lanes]
    alone = [replace(lane, policy=MODEL_ROUTING) for lane in balanced]
    scores = [_scores(scored, finished[:share], run) for scored in (balanced, alone)]
    changes = [one - other for one, other in zip(*scores, strict=True) if len(one) == len(other)]
    change, tokens = sum(float(part.sum()) for part in changes), sum(map(len, changes))
    change, tokens = world.comm.allreduce(np.array([change, tokens])).tolist()
    return change / tokens if tokens else float("nan")


def _fits_again(request: Request) -> bool:
    """Whether all its tokens take no more pages than it held: the last one was not fed back."""
    return pages_for(len(request.prompt_tokens) + len(request.tokens)) <= pages_for(request.capacity)


def _muted(lane: Lane) -> Lane:
    """The lane once more, scoring, without a trace of it anywhere."""
    context = replace(lane.context, task=Score(top=0), recorder=lane.context.recorder.muted())
    return replace(lane, context=context, trace=None)


def _scores(
    lanes: Sequence[Lane], requests: Sequence[Request], run: Callable[[Sequence[Lane]], object]
) -> list[npt.NDArray[np.float64]]:
    """Log-probabilities of each request's tokens; none of one that the lanes were stopped before."""
    again = [Request(request.prompt, request.prompt_tokens + request.tokens, limit=0) for request in requests]
    lanes[0].context.scheduler.submit(again)
    run(lanes)
    scores = []
    for request, scored in zip(requests, again, strict=True):
        picked = scored.sampled if scored.finish == "length" else []
        logprobs = np.concatenate([np.zeros(0), *(part.logprobs for part in picked)])
        scores.append(logprobs[-len(request.tokens) :] if request.tokens else logprobs)
    return scores
