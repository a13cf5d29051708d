"""Costs of a step against the mission's arithmetic, computed by hand, and against the points of the schedule."""

from dataclasses import replace
from itertools import product
from math import comb
from pathlib import Path

import numpy as np
import pytest
from msgspec import structs

from engine.jobs import make_job
from engine.runs import SPACES
from moempi.config.architecture import Architecture, AttentionShape, DeltaRule, Indexer, Latent
from moempi.config.machine_file import read_machine
from moempi.config.reading import read_toml
from moempi.layout.memory import WORKSPACE_BYTES, StageRank, graph_bytes, rank_memory
from moempi.layout.schedule import HEAD_POINTS, step_points
from moempi.layout.topology import Topology, virtual
from moempi.planning.step_cost import StepCosts, StepLoad

ROOT = Path(__file__).resolve().parent.parent.parent
MISSION = read_toml(ROOT / "jobs/arch/mission.toml", Architecture)
MACHINE = read_machine(ROOT / "jobs/machines/mission-h100.toml")
FLOPS, MEMORY, NVLINK, NETWORK = 240e12, 1440e9, 300e9, 45e9
WIDTH, HEADS, EXPERT, TOP_K = 7168, 128 * 128, 2048, 8


def costs(topology=None, **changes):
    fields = {"tensor": 1, "hops": 1, "hosted": 1, "row_bytes": 2 * WIDTH, "value_bytes": 2}
    return StepCosts(MACHINE, MISSION, topology or virtual(64, 8), **fields | changes)


def by_phase(phases, layer):
    return {phase.point.phase: phase for phase in phases if phase.point.layer == layer}


def test_many_rows_take_the_arithmetic_of_their_products():
    rows, context = 4096, 2048
    phases = by_phase(costs().step(range(30, 32), StepLoad(rows, 1, context), is_first=False, is_last=False), 31)
    attention = 4 * WIDTH * HEADS * 2 + 4 * HEADS * context
    assert phases["dispatch"].compute_s == pytest.approx(rows * (attention + 2 * WIDTH * 64) / FLOPS)
    assert phases["combine"].compute_s == pytest.approx(rows * TOP_K * 6 * WIDTH * EXPERT / FLOPS)
    # 939 and 705 MFLOP per token: the known costs of the mission's attention projections and experts.
    assert pytest.approx(939e6, rel=1e-3) == 8 * WIDTH * HEADS
    assert pytest.approx(705e6, rel=1e-3) == TOP_K * 6 * WIDTH * EXPERT


@pytest.mark.parametrize("tensor", [1, 8])
def test_what_gives_way_is_the_reading_of_the_cache_in_the_phase_of_attention(tensor):
    sequences, context = 54.0, 2048
    load = StepLoad(sequences, sequences, context)
    phases = costs(tensor=tensor).step(range(30, 32), load, is_first=False, is_last=True)
    cache_s = sequences * context * 2 * HEADS * 2 / tensor / MEMORY
    of_attention = "dispatch" if tensor == 1 else "scatter"
    for phase in phases:
        expected_s = cache_s if phase.point.phase == of_attention else 0.0
        assert phase.preemptible_s == pytest.approx(expected_s)
        assert phase.preemptible_s <= phase.compute_s
    queued = replace(costs(tensor=tensor), machine=structs.replace(MACHINE, preempts_attention=False))
    others = queued.step(range(30, 32), load, is_first=False, is_last=True)
    assert others == [phase._replace(preemptible_s=0.0) for phase in phases]


def test_attention_of_layers_without_phases_gives_way_in_the_phase_behind_it():
    """Layers 0 and 1 are dense: the attention of three layers comes before the experts of layer 2."""
    architecture = structs.replace(MISSION, dense_layers=(0, 1, 3), dense_width=WIDTH)
    load = StepLoad(8.0, 8.0, 2048)
    phases = replace(costs(), architecture=architecture).step(range(4), load, is_first=False, is_last=False)
    cache_s = 8 * 2048 * 2 * HEADS * 2 / MEMORY
    assert [phase.point.phase for phase in phases] == ["rows", "dispatch", "combine"]
    assert [phase.preemptible_s for phase in phases] == pytest.approx([cache_s, 3 * cache_s, 0.0])


def test_few_rows_take_the_reading_of_weights_and_cache():
    sequences, context = 1, 2048
    phases = by_phase(
        costs().step(range(30, 32), StepLoad(sequences, sequences, context), is_first=False, is_last=False), 31
    )
    cache = sequences * context * 2 * HEADS * 2
    attention = 4 * WIDTH * HEADS * 2
    assert phases["dispatch"].compute_s == pytest.approx((cache + attention + 2 * WIDTH * 64) / MEMORY)
    chosen = 1 - (1 - 1 / 64) ** (64 * TOP_K)
    assert phases["combine"].compute_s == pytest.approx(chosen * 3 * WIDTH * EXPERT * 2 / MEMORY)


def test_one_hop_sends_seven_eighths_to_other_nodes():
    rows = 1024
    phases = by_phase(costs().step(range(30, 32), StepLoad(rows, 1, 1), is_first=False, is_last=False), 31)
    num_bytes = rows * TOP_K * 2 * WIDTH
    seconds = num_bytes * (56 / 64 / NETWORK + 7 / 64 / NVLINK + 1 / 64 / MEMORY)
    for phase in ("dispatch", "combine"):
        rows_sent = phases[phase].transmissions[-1]
        assert rows_sent.link_s == pytest.approx(seconds)
        assert rows_sent.latency_s == pytest.approx(56 * 5e-6 + 7 * 2e-6)


def test_two_hops_send_a_row_once_to_each_distinct_node():
    rows = 1024
    phases = by_phase(costs(hops=2).step(range(30, 32), StepLoad(rows, 1, 1), is_first=False, is_last=False), 31)
    share = 1 - comb(56, TOP_K) / comb(64, TOP_K)
    assert pytest.approx(66.5, rel=0.01) == 7 * share * 2 * WIDTH / 1024  # KiB a token between nodes
    (there, inside), (inside_back, back) = phases["dispatch"].transmissions, phases["combine"].transmissions
    across, choices = (rows * 7 * share * num_bytes / NETWORK for num_bytes in (2 * WIDTH, 8 * TOP_K))
    assert there.link_s == pytest.approx(across + choices)
    assert back.link_s == pytest.approx(across)
    assert back.latency_s == pytest.approx(7 * 5e-6)
    assert there.latency_s > back.latency_s  # choices, and then the counts inside the node, travel beside the rows
    seconds = rows * TOP_K * 2 * WIDTH * (7 / 8 / NVLINK + 1 / 8 / MEMORY)
    assert inside.link_s == inside_back.link_s == pytest.approx(seconds)


def test_a_tensor_group_divides_attention_and_its_rows():
    load = StepLoad(8192, 1, 2048)
    alone = by_phase(costs().step(range(30, 32), load, is_first=False, is_last=False), 31)
    divided = by_phase(costs(tensor=8).step(range(30, 32), load, is_first=False, is_last=False), 31)
    assert divided["scatter"].compute_s + divided["dispatch"].compute_s == pytest.approx(
        alone["dispatch"].compute_s / 8
    )
    assert divided["combine"].compute_s == pytest.approx(alone["combine"].compute_s / 8)
    assert divided["dispatch"].link_s == pytest.approx(alone["dispatch"].link_s / 8)
    assert divided["gather"].link_s == pytest.approx(7 * 1024 * 2 * WIDTH / NVLINK)


@pytest.mark.parametrize("position", [(True, True), (True, False), (False, False), (False, True)])
def test_phases_are_the_points_of_the_schedule(position):
    is_first, is_last = position
    layers = range(0 if is_first else 1, 61 if is_last else 5)
    for tensor, hops, head in product((1, 8), (1, 2), ("tensor", "stage")):
        own = costs(tensor=tensor, hops=hops, head=head)
        phases = own.step(layers, StepLoad(64, 64, 100), is_first=is_first, is_last=is_last)
        ranks = is_last * (64 if head == "stage" else tensor)
        points = step_points(layers, MISSION.moe_layers, tensor=tensor, is_first=is_first, head=ranks)
        assert tuple(phase.point for phase in phases) == points


@pytest.mark.parametrize("tensor", [1, 2])
def test_phases_of_layers_with_one_half_alone_are_the_points_of_the_schedule(tensor):
    found = replace(costs(tensor=tensor), architecture=SPACES)
    phases = found.step(range(6), StepLoad(64, 64, 100), is_first=True, is_last=True)
    points = step_points(range(6), (1, 5), tensor=tensor, is_first=True, head=tensor, half_layers=(0, 1, 2, 3, 4, 5))
    assert tuple(phase.point for phase in phases) == points
    layers = [phase.point.layer for phase in phases if phase.point.layer >= 0]
    assert layers == ([1, 1, 5, 5] if tensor == 1 else [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5])


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_rank_alone_has_no_overhead_of_exchanges(num_ranks):
    machine = structs.replace(MACHINE, turn_us=1e6)
    found = replace(costs(virtual(num_ranks, 1), hosted=64 // num_ranks), machine=machine)
    phases = found.step(range(30, 33), StepLoad(8, 8, 100), is_first=False, is_last=False)
    assert len(phases) == 7
    overhead_s = 1 + 6 * (num_ranks > 1)  # of the rows from the stage before
    assert sum(phase.compute_s for phase in phases) == pytest.approx(overhead_s, rel=0.01)


@pytest.mark.parametrize("hops", [1, 2])
def test_latent_experts_are_sent_shorter_rows_which_two_products_map(hops):
    rows, latent = 4096, 512
    architecture = structs.replace(MISSION, experts=structs.replace(MISSION.experts, latent_width=latent))
    plain, found = (
        by_phase(one.step(range(30, 33), StepLoad(rows, 1, 1), is_first=False, is_last=False), 31)
        for one in (costs(hops=hops), replace(costs(hops=hops), architecture=architecture))
    )
    for phase in ("dispatch", "combine"):
        sent_s, shorter_s = (one[phase].transmissions[-1].link_s for one in (plain, found))
        assert shorter_s == pytest.approx(sent_s * latent / WIDTH)
    down_and_up_s = 2 * 2 * rows * WIDTH * latent / FLOPS  # up in the layer before
    assert found["dispatch"].compute_s - plain["dispatch"].compute_s == pytest.approx(down_and_up_s)
    assert found["combine"].compute_s == pytest.approx(rows * TOP_K * 6 * latent * EXPERT / FLOPS)


@pytest.mark.parametrize("tensor", [1, 8])
def test_the_last_stage_reads_its_share_of_the_head(tensor):
    last, other = (
        costs(tensor=tensor).step(range(59, 61), StepLoad(64, 64, 100), is_first=False, is_last=is_last)
        for is_last in (True, False)
    )
    head = 2 * 129280 * WIDTH / MEMORY / tensor
    others = tensor - 1
    assert sum(phase.compute_s for phase in last) - sum(phase.compute_s for phase in other) == pytest.approx(head)
    transfers_s = others * 64 / tensor * (2 * WIDTH + 4 * 129280 / tensor + 8) / NVLINK + 3 * others * 2e-6
    of_head = [phase.travel_s for phase in last if phase.point in HEAD_POINTS]
    assert sum(of_head) == pytest.approx(transfers_s)


@pytest.mark.parametrize("tensor", [1, 8])
def test_all_ranks_of_a_stage_read_a_64th_of_the_head_and_compute_the_rows_of_all_groups(tensor):
    load = StepLoad(48, 48, 100)
    divided, whole = (
        {phase.point: phase for phase in one.step(range(59, 61), load, is_first=False, is_last=True)}
        for one in (costs(tensor=tensor, head="stage"), costs(tensor=tensor))
    )
    counts, rows, logits, sampled = (divided[point] for point in HEAD_POINTS)
    groups, own, nodes_s = 64 // tensor, 48 / tensor, {1: 6 * 5e-6, 8: 3 * 5e-6}[tensor]  # Bruck's messages
    values = 129280 * WIDTH / 64
    assert logits.compute_s == pytest.approx(max(2 * 48 * groups * values / FLOPS, 2 * values / MEMORY))
    assert counts.travel_s == pytest.approx(nodes_s + (groups - 1) * tensor * 8 / NETWORK)
    inside, inside_s = (tensor - 1) * groups * own / NVLINK, (tensor - 1) * 2e-6
    assert rows.link_s == pytest.approx((groups - 1) * own * 2 * WIDTH / NETWORK + inside * 2 * WIDTH)
    assert rows.travel_s - rows.link_s == pytest.approx(nodes_s + inside_s)
    slice_bytes, near = 4 * 129280 / 64, {1: 7, 8: 0}[tensor]
    across = (groups - 1 - near) / NETWORK + near / NVLINK
    assert logits.link_s == pytest.approx(own * slice_bytes * tensor * across + inside * slice_bytes)
    assert logits.travel_s - logits.link_s == pytest.approx((groups - 1 - near) * 5e-6 + near * 2e-6 + inside_s)
    if tensor == 8:
        assert sampled == whole[HEAD_POINTS[-1]]
    else:
        assert sampled.travel_s == 0


@pytest.mark.parametrize("tensor", [1, 8])
def test_every_dense_layer_counts(tensor):
    one, three = (
        costs(tensor=tensor).step(range(first, 4), StepLoad(4096, 1, 2048), is_first=False, is_last=False)
        for first in (3, 0)
    )
    dense = 4096 * (4 * WIDTH * HEADS * 2 + 4 * HEADS * 2048 + 6 * WIDTH * 18432) / FLOPS / tensor
    assert sum(phase.compute_s for phase in three) - sum(phase.compute_s for phase in one) == pytest.approx(3 * dense)


def test_one_rank_sends_nothing():
    phases = costs(Topology((0,)), hosted=64).step(range(61), StepLoad(8, 8, 100), is_first=True, is_last=True)
    to_itself = 8 * TOP_K * 2 * WIDTH / MEMORY
    sent = [one for phase in phases for one in phase.transmissions]
    assert all(one.link_s == pytest.approx(0) or one.link_s == pytest.approx(to_itself) for one in sent)
    assert all(one.latency_s < 1e-9 for one in sent)


@pytest.mark.parametrize("tensor", [1, 8])
def test_immediate_routing_sends_each_output_and_each_residual_to_the_next_stage(tensor):
    load, layers = StepLoad(512, 64, 100), range(30, 32)
    back, immediate = (
        costs(tensor=tensor, immediate=immediate).step(layers, load, is_first=False, is_last=False)
        for immediate in (False, True)
    )
    points = step_points(layers, MISSION.moe_layers, tensor=tensor, is_first=False, immediate=True)
    assert tuple(phase.point for phase in immediate) == points
    assert sum(phase.compute_s for phase in immediate) == pytest.approx(sum(phase.compute_s for phase in back))
    rows = 512 / tensor
    assert immediate[0].sent.link_s == pytest.approx(rows * (TOP_K + 1) * 2 * WIDTH / NETWORK)
    assert immediate[0].sent.latency_s == pytest.approx(64 * 5e-6, rel=0.01)
    returned = by_phase(back, 31)["combine"].travel_s + sum(phase.travel_s for phase in back if phase.point.layer == -1)
    assert sum(phase.travel_s for phase in immediate) == pytest.approx(sum(phase.travel_s for phase in back) - returned)


@pytest.mark.parametrize(("tensor", "hops", "immediate"), [(1, 1, False), (1, 1, True), (8, 2, False), (8, 1, True)])
def test_many_loads_at_once_cost_what_each_costs_alone(tensor, hops, immediate):
    own = costs(tensor=tensor, hops=hops, immediate=immediate)
    rows, sequences = np.array([0.5, 8.0, 600.0, 40000.0]), np.array([0.5, 8.0, 300.0, 10.0])
    many = own.step(range(2, 5), StepLoad(rows, sequences, 100), is_first=False, is_last=False)
    for index in range(4):
        load = StepLoad(float(rows[index]), float(sequences[index]), 100)
        for one, of_many in zip(own.step(range(2, 5), load, is_first=False, is_last=False), many, strict=True):
            for name in ("compute_s", "beside_s", "link_s", "travel_s"):
                assert getattr(one, name) == pytest.approx(np.broadcast_to(getattr(of_many, name), 4)[index])
            assert type(one.compute_s) in (float, int)


@pytest.mark.parametrize("hops", [1, 2])
def test_the_ranks_that_host_experts_receive_the_rows_of_all(hops):
    """128 ranks for 64 experts: rows go to the first 64, twice as many to each."""
    load = StepLoad(1024, 1, 1)
    even, surplus = (
        by_phase(costs(virtual(ranks, 8), hops=hops).step(range(30, 32), load, is_first=False, is_last=False), 31)
        for ranks in (64, 128)
    )
    for phase in ("dispatch", "combine"):
        assert surplus[phase].link_s == pytest.approx(2 * even[phase].link_s)


def test_sparse_attention_reads_the_chosen_positions_and_an_indexer_the_keys_of_all():
    indexer = Indexer(num_heads=64, head_dim=128, top_k=2048, shared_layers=(31,))
    latent = Latent(key_value_rank=512, rope_dim=64, value_dim=128, query_rank=1536, indexer=indexer)
    attention = AttentionShape(num_heads=128, num_kv_heads=128, head_dim=192, latent=latent)

    def seconds(layer, context, attention=attention):
        architecture = structs.replace(MISSION, attention=attention)
        load = StepLoad(rows=1, sequences=1, context=context)
        stage = replace(costs(), architecture=architecture).step(range(30, 32), load, is_first=False, is_last=False)
        return by_phase(stage, layer)["dispatch"].compute_s

    dense = structs.replace(attention, latent=structs.replace(latent, indexer=None))
    of_indexer = 2 * (64 * 128 * 1536 + 128 * WIDTH + 64 * WIDTH) / MEMORY
    assert seconds(30, 2048) == pytest.approx(seconds(30, 2048, dense) + of_indexer)
    assert seconds(31, 2048) == seconds(31, 2048, dense)
    assert seconds(31, 60_000) == pytest.approx(seconds(31, 2048))
    assert seconds(30, 60_000) - seconds(30, 50_000) == pytest.approx(10_000 * 128 * 2 / MEMORY)
    assert seconds(30, 60_000) < seconds(30, 60_000, dense)


def test_the_keys_of_indexers_are_counted_in_the_cache():
    indexer = Indexer(num_heads=4, head_dim=16, top_k=8, shared_layers=(1, 3))
    latent = Latent(key_value_rank=32, rope_dim=8, value_dim=8, query_rank=8)
    architectures = [
        structs.replace(
            MISSION,
            attention=AttentionShape(
                num_heads=4, num_kv_heads=4, head_dim=16, latent=structs.replace(latent, indexer=one)
            ),
        )
        for one in (None, indexer)
    ]
    job = make_job(run={"precision": "bfloat16"})
    pages = [rank_memory(job, one, StageRank(range(4), hosted=1, groups=1), on_gpu=True).page for one in architectures]
    assert pages == [64 * 2 * 4 * 40, 64 * 2 * (4 * 40 + 2 * 16)]


def test_the_memory_of_graphs_is_counted_for_each_lane_on_a_gpu():
    def rows(job, *, on_gpu=True):
        return rank_memory(job, MISSION, StageRank(range(4), hosted=1, groups=1), on_gpu=on_gpu).rows

    run = {"micro_batches": 3, "lanes": 3, "precision": "bfloat16"}
    plain, captured = (make_job(run=run | {"capture": capture}) for capture in (False, True))
    assert rows(captured) - rows(plain) == 3 * graph_bytes(captured, MISSION, row_bytes=2)
    assert rows(captured, on_gpu=False) == rows(plain, on_gpu=False)


def test_where_nothing_is_captured_a_lane_has_the_memory_of_cublas_alone():
    latent = Latent(key_value_rank=32, rope_dim=8, value_dim=16, indexer=Indexer(num_heads=2, head_dim=16, top_k=8))
    indexed = structs.replace(MISSION, attention=AttentionShape(4, 4, 16, latent=latent))
    alone, group = (make_job(parallel={"tensor": tensor}) for tensor in (1, 2))
    assert graph_bytes(group, MISSION, row_bytes=2) == graph_bytes(alone, indexed, row_bytes=2) == WORKSPACE_BYTES
    assert graph_bytes(alone, MISSION, row_bytes=2) > 2 * WORKSPACE_BYTES


@pytest.mark.parametrize("tensor", [1, 8])
def test_a_state_is_read_and_written_once_a_step_whatever_the_context(tensor):
    rule = DeltaRule(num_key_heads=16, num_value_heads=32, key_dim=128, value_dim=128, taps=4)
    model = structs.replace(MISSION, delta_rule=rule, delta_layers=(31,))
    found = replace(costs(tensor=tensor), architecture=model)

    def seconds(sequences, context):
        phases = found.step(range(30, 32), StepLoad(sequences, sequences, context), is_first=False, is_last=False)
        return sum(phase.compute_s for phase in phases if phase.point.layer == 31)

    assert seconds(64, 100) == seconds(64, 100_000)
    state_s = 2 * 4 * rule.state_values / tensor / MEMORY
    assert seconds(64, 100) - seconds(32, 100) >= 32 * state_s
