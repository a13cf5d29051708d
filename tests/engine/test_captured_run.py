"""Runs with CUDA graphs have the results of runs without, whoever chooses experts and however rows are sent."""

from collections import Counter
from contextlib import closing, nullcontext

import h5py
import numpy as np
import pytest

from engine.runs import SMALL, Run, requests_of, tokens_of
from engine.test_replay import EXPERTS, LENGTHS, TOP_K, opened
from moempi.backend.cuda.backend import CudaBackend
from moempi.config.job import ReplaySection
from moempi.model.transformer import Layer
from simt.device import SimtDevice

LIMIT = 6
CHOOSERS = {
    "bias": {"balance": {"mode": "bias", "sample": 0, "rate": 0.2}},
    "capacity": {"balance": {"mode": "capacity", "sample": 0, "capacity": 1.0}},
    "replay": {},
}
OTHERS = {
    "traced": {"trace": {"routing": "weights"}},
    "two hops": {"exchange": {"hops": 2, "transport": "pairwise"}, "topology": {"ranks_per_node": 1}},
}


class CountedDevice(SimtDevice):
    """A SIMT device with the number of launches of each kernel that were recorded."""

    def __init__(self):
        super().__init__(finds_races=False)
        self.recorded = Counter()

    def launch(self, kernel, grid, threads, arguments, **options):
        if self._captured is not None:
            self.recorded[kernel.name] += 1
        super().launch(kernel, grid, threads, arguments, **options)


def replay_of(path, requests):
    """A replay of random experts for all positions of the requests."""
    offsets = np.cumsum([0, *(length + LIMIT - 1 for length in LENGTHS)])
    experts = np.random.default_rng(0).random((offsets[-1], len(SMALL.moe_layers), EXPERTS)).argsort(axis=-1)
    with h5py.File(path, "w") as file:
        file["offsets"], file["layer"] = offsets, np.array(SMALL.moe_layers, np.int32)
        file["experts"] = experts[..., :TOP_K].astype(np.int16)
    replay = opened(ReplaySection(str(path)), [request.prompt for request in requests])
    assert not any(map(replay.problem_of, requests))
    return replay


def run_with(folder, name, *, capture):
    """The tokens of all requests with the load of experts in each lane and layer, and the recorded kernels."""
    folder.mkdir()
    device, requests = CountedDevice(), requests_of(*LENGTHS, limit=LIMIT)

    def make_backend(progress):
        return CudaBackend(device, precision="float32", reproducible=False, capture=capture, progress=progress)

    with closing(replay_of(folder / "given.h5", requests)) if name == "replay" else nullcontext() as replay:
        settings = {"run": {"micro_batches": 2}} | (CHOOSERS | OTHERS).get(name, {})
        run = Run(folder, requests, make_backend=make_backend, replay_of=replay, **settings)
        run.lanes.run()
        run.journal.close()
    loads = [lane.comm.exchange.expert_load for lane in run.lanes.each]
    return tokens_of(requests), [{layer: load.tolist() for layer, load in of.items()} for of in loads], device.recorded


def test_graphs_choose_experts_by_the_router(tmp_path):
    *found, recorded = run_with(tmp_path / "graphs", "router", capture=True)
    *expected, none = run_with(tmp_path / "verbs", "router", capture=False)
    assert found == expected
    assert not none
    assert recorded["attend_rows"] > recorded["choose_experts"] == recorded["pack_choices"] > 0


@pytest.mark.parametrize("name", CHOOSERS | OTHERS)
def test_graphs_have_the_attention_alone_where_others_choose_experts_or_send_rows(tmp_path, name):
    *found, recorded = run_with(tmp_path / "graphs", name, capture=True)
    *expected, _ = run_with(tmp_path / "verbs", name, capture=False)
    assert found == expected
    assert recorded["attend_rows"] > recorded["choose_experts"] == recorded["pack_choices"] == 0


@pytest.mark.parametrize("name", CHOOSERS)
def test_graphs_that_choose_in_the_place_of_a_policy_are_found(tmp_path, monkeypatch, name):
    """The planted fault: the router chooses in the graph whatever the policy."""

    def physical_ids(self, exchange, policy):
        return exchange.physical_ids(self.index) if self.index in SMALL.moe_layers else None

    monkeypatch.setattr(Layer, "physical_ids", physical_ids)
    *found, recorded = run_with(tmp_path / "graphs", name, capture=True)
    *expected, _ = run_with(tmp_path / "verbs", name, capture=False)
    assert recorded["choose_experts"]
    assert found != expected
