"""What balances the lanes of a rank: one policy for each lane, over the MoE layers of its stage."""

from types import SimpleNamespace

import numpy as np
import pytest

from engine.runs import SMALL, Run, requests_of
from moempi.backend.cpu.backend import NumpyBackend
from moempi.config.job import BalanceSection
from moempi.engine.balance import Balance, make_balance, quality_cost
from moempi.model.router_balance import MODEL_ROUTING, BiasPolicy, CapacityPolicy, ExpertBias, MoveCounter

ALL_LAYERS = range(SMALL.num_layers)
NUM_LANES, NUM_EXPERTS = 3, SMALL.experts.num


class FakeStage:
    """A stage of one rank, whose sums are finished at once."""

    size, rank = 1, 0

    def iallreduce_sum(self, amounts):
        return SimpleNamespace(finish=lambda: np.array(amounts, np.int64))


def make(layers=ALL_LAYERS, **rules):
    comms = [SimpleNamespace(stage=FakeStage()) for _ in range(NUM_LANES)]
    return make_balance(BalanceSection(**rules), comms, SMALL, layers)


@pytest.mark.parametrize("layers", [ALL_LAYERS, range(1, 2)])
def test_a_job_that_is_not_balanced_has_no_balance(layers):
    assert make(layers, mode="off") is None


@pytest.mark.parametrize("mode", ["bias", "capacity"])
def test_a_stage_of_dense_layers_alone_routes_as_the_model_does(mode):
    balance = make(range(1, 2), mode=mode)
    assert balance.policies == [MODEL_ROUTING] * NUM_LANES
    assert not balance.asked_load(SMALL.num_layers).any()
    assert not balance.bias_by_layer(SMALL.num_layers).any()


@pytest.mark.parametrize(("mode", "kind"), [("bias", BiasPolicy), ("capacity", CapacityPolicy)])
def test_each_lane_has_a_policy_of_its_own(mode, kind):
    policies = make(mode=mode).policies
    assert [type(policy) for policy in policies] == [kind] * NUM_LANES
    assert len(set(map(id, policies))) == NUM_LANES


def step(policy, logits, layers=SMALL.moe_layers):
    """Route one step's rows with these router logits in each layer; the experts chosen."""
    backend, router = NumpyBackend(precision="float32"), SMALL.experts.router
    policy.begin_step(np.zeros(len(logits), np.int64), np.arange(len(logits)))
    chosen = [policy.choose(backend, layer, logits, router, None)[0] for layer in layers]
    policy.end_step()
    policy.flush()
    return np.array(chosen)


SKEWED = np.tile(np.array([3.0, 2.0, 1.0, 0.0], np.float32), (8, 1))  # experts 0 and 1 of all rows


def test_the_lanes_share_one_bias_that_changes_by_the_rate_within_the_bound():
    balance = make(mode="bias", rate=0.02, bound=0.03)
    for lane, expected in ((0, 0.02), (2, 0.03)):
        step(balance.policies[lane], SKEWED)
        terms = balance.bias_by_layer(SMALL.num_layers)
        np.testing.assert_allclose(terms[list(SMALL.moe_layers)], [[-expected] * 2 + [expected] * 2] * 3, rtol=1e-6)
        assert not terms[1].any()  # the dense layer


def test_the_capacity_limits_a_step_s_load_of_an_expert_by_the_factor():
    for factor, most in ((1.0, 4), (1.5, 6), (4.0, 8)):
        balance = make(mode="capacity", capacity=factor)
        chosen = step(balance.policies[0], SKEWED)
        assert max(np.bincount(layer.reshape(-1)).max() for layer in chosen) == most


@pytest.mark.parametrize(("mode", "moved"), [("bias", 0), ("capacity", 8 * 3)])
def test_the_load_that_the_router_prefers_is_counted_by_layer_over_all_lanes(mode, moved):
    balance = make(mode=mode, capacity=1.0)
    step(balance.policies[0], SKEWED)
    assert balance.moves.moved == moved  # the bias takes effect from the next step on
    step(balance.policies[1], SKEWED[:2], layers=SMALL.moe_layers[:1])
    load = balance.asked_load(SMALL.num_layers)
    assert load.dtype == np.int64
    assert load.tolist() == [[10, 10, 0, 0], [0, 0, 0, 0], [8, 8, 0, 0], [8, 8, 0, 0]]


def test_layers_of_other_stages_have_no_load_and_no_bias():
    layers = (2,)
    moves, bias = MoveCounter(layers, NUM_EXPERTS), ExpertBias(layers, NUM_EXPERTS, rate=1.0, bound=9.0)
    moves.count(2, np.array([[0, 3]]), np.array([[0, 1]]))
    bias.update(np.array([[4, 0, 0, 0]]))
    balance = Balance([MODEL_ROUTING], moves, bias)
    assert balance.asked_load(5).tolist() == [[0] * 4, [0] * 4, [1, 0, 0, 1], [0] * 4, [0] * 4]
    assert balance.bias_by_layer(5).tolist() == [[0] * 4, [0] * 4, [-1, 1, 1, 1], [0] * 4, [0] * 4]
    assert balance.bias_by_layer(5).dtype == np.float32


# The cost in quality


def cost(run, *, sample=8):
    lanes = run.lanes
    return quality_cost(lanes.each, run.requests, run.world, sample=sample, run=lanes.run)


def test_routing_that_moves_nothing_costs_nothing_and_leaves_no_trace(tmp_path):
    run = Run(tmp_path, requests_of(4, 9, 6), balance={"mode": "capacity", "capacity": float(NUM_EXPERTS)})
    run.lanes.run()
    tokens, steps, counts = (
        [list(request.tokens) for request in run.requests],
        run.recorder.steps,
        run.recorder.counts(),
    )
    assert cost(run) == 0.0
    assert [request.tokens for request in run.requests] == tokens
    assert (run.recorder.steps, run.recorder.counts()) == (steps, counts)
    assert not run.scheduler.num_unfinished


def test_routing_that_moves_choices_costs_a_finite_amount(tmp_path):
    run = Run(tmp_path, requests_of(4, 9, 6), balance={"mode": "capacity", "capacity": 1.0})
    run.lanes.run()
    assert run.lanes.balance.moves.moved > 0
    change = cost(run)
    assert np.isfinite(change)
    assert change != 0.0


def test_without_finished_requests_the_cost_is_unknown(tmp_path):
    run = Run(tmp_path, balance={"mode": "capacity"})
    run.lanes.run()
    assert np.isnan(cost(run))
