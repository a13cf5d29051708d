"""Runs whose layers are fused on a rank that is alone in its stage have the results of runs by separate verbs."""

import sys

import pytest
from msgspec import structs

from engine.runs import SMALL, Run, requests_of, tokens_of
from moempi.backend.cpu import fused
from moempi.backend.cpu.compiled import CompiledBackend
from moempi.backend.cpu.fused import KernelAttention, KernelExperts, KernelLayers
from moempi.backend.cpu.kernels import load_kernels
from moempi.config.architecture import Clamp
from moempi.storage.journal import JournalReader
from moempi.storage.records import TraceRecord

pytestmark = pytest.mark.skipif(load_kernels() is None, reason="no C compiler, or a processor without kernels")
LENGTHS = (5, 3, 30, 1, 12)
ARCHITECTURES = {
    "plain": SMALL,
    "shared": structs.replace(SMALL, experts=structs.replace(SMALL.experts, shared_width=10, shared_gate=True)),
    "clamped": structs.replace(SMALL, experts=structs.replace(SMALL.experts, biases=True, clamp=Clamp(1.7, 2.0))),
    "alone": structs.replace(SMALL, dense_layers=()),
    "grouped": structs.replace(SMALL, attention=structs.replace(SMALL.attention, num_kv_heads=1, qk_norm="head")),
}


class Separate(CompiledBackend):
    """Has no fused parts."""

    def fuse_attention(self, block):
        return None

    def fuse_experts(self, block):
        return None


class InParts(CompiledBackend):
    """Has fused parts of layers, but no fused layers."""

    def fuse_layers(self, layers):
        return None


@pytest.fixture
def num_calls(monkeypatch):
    """Calls of each fused part."""
    calls = {KernelAttention: 0, KernelExperts: 0, KernelLayers: 0}

    def counted(part):
        plain = part.__call__

        def call(self, *arguments):
            calls[part] += 1
            return plain(self, *arguments)

        monkeypatch.setattr(part, "__call__", call)

    for part in calls:
        counted(part)
    return calls


def result_of(folder, backend, precision, **options):
    """Tokens, loads, counters and recorded values of a run."""
    folder.mkdir()
    kernels, run = load_kernels(), options.pop("run", {})
    made = Run(
        folder,
        requests_of(*LENGTHS),
        make_backend=lambda progress: backend(kernels, precision=precision, progress=progress),
        run={"precision": precision} | run,
        **options,
    )
    made.lanes.run()
    loads = [lane.comm.exchange.expert_load for lane in made.lanes.each]
    made.journal.close()
    with JournalReader(folder / "0.part") as journal:
        traces = [record for _, record in journal.records() if isinstance(record, TraceRecord)]
    return (
        tokens_of(made.requests),
        [one.logprobs.tolist() for request in made.requests for one in request.sampled],
        [{layer: load.tolist() for layer, load in of_lane.items()} for of_lane in loads],
        [lane.comm.transfers.counters for lane in made.lanes.each],
        [{name: values.tolist() for name, values in record.columns.items()} for record in traces],
    )


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"run": {"micro_batches": 2}},
        {"trace": {"routing": "weights", "hidden": (0, 1, 2, 3)}},
        {"balance": {"mode": "bias"}},
    ],
    ids=["plain", "lanes", "trace", "balance"],
)
def test_fused_layers_change_no_result(name, precision, options, num_calls, tmp_path):
    options = {"architecture": ARCHITECTURES[name]} | options
    expected = result_of(tmp_path / "separate", Separate, precision, **options)
    assert not any(num_calls.values())
    assert result_of(tmp_path / "parts", InParts, precision, **options) == expected
    assert num_calls[KernelAttention] > 0
    assert (num_calls[KernelExperts] > 0) is ("balance" not in options)
    assert not num_calls[KernelLayers]
    assert result_of(tmp_path / "fused", CompiledBackend, precision, **options) == expected
    can_fuse = name == "alone" and "balance" not in options and "hidden" not in options.get("trace", {})
    assert (num_calls[KernelLayers] > 0) is can_fuse


@pytest.mark.parametrize(("limit", "value"), [("FUSED_BYTES", 2.5e4), ("FUSED_FLOPS", 1.5e5), ("FUSED_ROWS", 2)])
def test_layers_are_computed_in_calls_of_limited_work(limit, value, monkeypatch, tmp_path):
    options = {"architecture": structs.replace(ARCHITECTURES["alone"], num_layers=5), "trace": {"routing": "weights"}}
    expected = result_of(tmp_path / "separate", Separate, "bfloat16", **options)
    plain, calls = KernelLayers.__call__, []

    def call(self, layers, x, *arguments):
        calls.append((layers, len(x)))
        return plain(self, layers, x, *arguments)

    monkeypatch.setattr(KernelLayers, "__call__", call)
    monkeypatch.setattr(fused, limit, value)
    assert result_of(tmp_path / "fused", CompiledBackend, "bfloat16", **options) == expected
    if limit == "FUSED_ROWS":
        assert {num_rows for _, num_rows in calls} == {1, 2}
    else:
        assert any(layers.start for layers, _ in calls)


def calls_of(folder, num_layers, tokens):
    """Calls of functions, in Python or C, of a run that generates `tokens` tokens after one prompt."""
    folder.mkdir()
    architecture = structs.replace(SMALL, num_layers=num_layers, dense_layers=())
    run = Run(
        folder,
        requests_of(4, limit=tokens),
        architecture=architecture,
        make_backend=lambda progress: CompiledBackend(load_kernels(), precision="float32", progress=progress),
    )
    count = 0

    def on_event(frame, event, argument):
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(on_event)
    try:
        run.lanes.run(run.lanes.each[:1])
    finally:
        sys.setprofile(None)
    return count


def test_a_decode_step_makes_few_calls_in_a_layer(tmp_path):
    few, many = ([calls_of(tmp_path / f"{layers}-{tokens}", layers, tokens) for tokens in (4, 12)] for layers in (2, 6))
    of_layers = (many[1] - many[0]) - (few[1] - few[0])
    assert of_layers / (4 * 8) <= 10
