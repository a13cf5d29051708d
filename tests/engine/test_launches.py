"""What a layer of a decode step submits to the device, in its order, and its allocations and waits."""

from collections import Counter

import pytest
from mpi4py import MPI
from msgspec import structs

from engine.runs import SMALL, Run, requests_of
from moempi.backend.cuda.backend import CudaBackend
from moempi.config.architecture import AttentionShape, Latent
from simt.device import SimtDevice

ARCHITECTURE = structs.replace(
    SMALL,
    width=64,
    num_layers=3,
    max_positions=512,
    experts=structs.replace(SMALL.experts, width=64),
    dense_layers=(),
)


class CountedDevice(SimtDevice):
    """A SIMT device with the names of all work that was submitted, and the calls that submit none, each behind work."""

    def __init__(self, *, pinned=True):
        super().__init__(pinned=pinned, finds_races=False)
        self.names = []
        self.calls = []

    def called(self, name):
        self.calls.append((len(self.names), name))

    def empty(self, shape, dtype):
        self.called("from the pool")
        return super().empty(shape, dtype)

    def comm_buffer(self, shape, dtype):
        self.called("from the driver")
        return super().comm_buffer(shape, dtype)

    def allocate_shared(self, shape, dtype):
        self.called("from the driver")
        return super().allocate_shared(shape, dtype)

    def download(self, values):
        self.called("wait")
        return super().download(values)

    def record_event(self):
        self.called("event")
        event = super().record_event()
        synchronize = event.synchronize
        event.synchronize = lambda: (self.called("wait"), synchronize())
        return event

    def launch(self, kernel, grid, threads, arguments, **options):
        self.names.append(kernel.name)
        super().launch(kernel, grid, threads, arguments, **options)

    def product(self, x, matrix, out, *, transposed):
        self.names.append("product")
        super().product(x, matrix, out, transposed=transposed)

    def products(self, x, matrices, out):
        self.names.append("products")
        super().products(x, matrices, out)

    def copy(self, values, out):
        self.names.append("copy")
        super().copy(values, out)

    def upload(self, values):
        self.names.append("upload")
        return super().upload(values)

    def launch_graph(self, graph):
        self.names.append("graph")
        super().launch_graph(graph)

    def start_download(self, values):
        self.names.append("download")
        return super().start_download(values)


def last_step(folder, architecture, comm=MPI.COMM_SELF, *, pinned=True, capture=False, limit=3):
    """The device, and its work in a step that decodes sequences of 300 and of 5 tokens, behind its rotary angles."""
    device = CountedDevice(pinned=pinned)

    def make_backend(progress):
        return CudaBackend(device, precision="bfloat16", reproducible=False, capture=capture, progress=progress)

    settings = {"batch_tokens": 320, "micro_batches": 1, "precision": "bfloat16"}
    requests = requests_of(300, 5, limit=limit)
    run = Run(folder, requests, comm=comm, architecture=architecture, make_backend=make_backend, run=settings)
    run.lanes.run()
    run.journal.close()
    return device, device.names[-device.names[::-1].index("rope_angles") :]


LATENT = AttentionShape(
    num_heads=2,
    num_kv_heads=2,
    head_dim=24,
    latent=Latent(key_value_rank=32, rope_dim=8, value_dim=16, query_rank=8),
)
ATTENTION = ["product", "rotate_into_cache", "attend_rows", "product"]
LATENT_ATTENTION = [
    *("product", "extend_latent_cache"),  # queries and keys
    *("product", "products"),  # queries
    *("attend_rows", "products", "product"),
]
SHORT_LATENT = structs.replace(LATENT, latent=structs.replace(LATENT.latent, query_rank=0))
SHORT_LATENT_ATTENTION = [name for number, name in enumerate(LATENT_ATTENTION) if number != 2]
EXPERTS = [
    *("product", "choose_experts", "pack_choices", "download"),
    *("gate_up_few", "multiply_few", "combine_rms_norm"),
]


@pytest.mark.parametrize(
    ("attention", "attention_names", "number"),
    [
        (SMALL.attention, ATTENTION, 11),
        (structs.replace(SMALL.attention, qk_norm="head"), ATTENTION, 11),
        (LATENT, LATENT_ATTENTION, 14),
        (SHORT_LATENT, SHORT_LATENT_ATTENTION, 13),
    ],
    ids=["plain", "normalized heads", "latent", "latent keys alone"],
)
def test_a_layer_of_a_decode_step_submits_this_and_no_more(tmp_path, attention, attention_names, number):
    """Kernels and products, and the download of the counts by which rows are sent."""
    _, names = last_step(tmp_path, structs.replace(ARCHITECTURE, attention=attention))
    names.remove("upload")  # where the step's rows are in the cache, once for all layers
    layer = [*attention_names, "add_rms_norm", *EXPERTS]  # and the norm of the next layer
    assert len(layer) - layer.count("download") == number
    head = ["upload", "take_rows", "rms_norm"]
    expected = ["rms_norm", *3 * layer]
    expected[-1] = "combine"
    assert names[: len(expected) + len(head)] == [*expected, *head]


def test_a_layer_of_a_decode_step_waits_for_nothing_and_takes_no_memory_of_the_driver(tmp_path):
    """The host polls one event, of the counts, and uploads nothing; the pool's memory is that of the layer before."""
    device, names = last_step(tmp_path, ARCHITECTURE)
    first = len(device.names) - len(names)
    second, third = (first + number for number, name in enumerate(names) if name == "combine_rms_norm")
    assert "upload" not in device.names[second:third]
    calls = Counter(name for behind, name in device.calls if second < behind <= third)
    assert calls == {"from the pool": 16, "event": 1}


@pytest.mark.ranks(2)
def test_rows_leave_before_the_shared_expert_computes(comm, tmp_path):
    """They are packed behind no event but the one of their counts; the other event is of the outputs that return."""
    experts = structs.replace(ARCHITECTURE.experts, num=2, shared_width=64)  # one a rank: all outputs return in order
    architecture = structs.replace(ARCHITECTURE, experts=experts)
    device, names = last_step(comm.bcast(tmp_path), architecture, comm, pinned=False)
    first = len(device.names) - len(names)
    packed, again, _ = (first + number for number, name in enumerate(names) if name == "pack_choices")
    events = [device.names[behind - 1] for behind, name in device.calls if name == "event" and packed < behind <= again]
    assert events == ["download", "multiply_few"]
    assert device.names[packed : packed + 5] == ["pack_choices", "download", "product", "swiglu", "product"]


@pytest.mark.parametrize("pinned", [True, False], ids=["host buffers", "device buffers"])
@pytest.mark.parametrize("attention", [SMALL.attention, LATENT], ids=["plain", "latent"])
def test_a_captured_layer_of_a_decode_step_submits_six(tmp_path, attention, pinned):
    """The graph has all from the norm of the layer to the rows that are sorted by expert."""
    architecture = structs.replace(ARCHITECTURE, attention=attention)
    device, names = last_step(tmp_path, architecture, pinned=pinned, capture=True, limit=6)
    layer = ["copy", "graph", "take_rows", "download", "gate_up_few", "multiply_few", "combine"]
    assert len(layer) - layer.count("download") == 6
    step = ["upload", *["copy"] * 5]  # of angles, positions, pages and rows that are none
    assert names[: len(step) + 3 * len(layer)] == [*step, *3 * layer]
    first = len(device.names) - len(names)
    ends = [first + number for number, name in enumerate(names) if name == "combine"]
    second, third = ends[:2]
    calls = Counter(name for behind, name in device.calls if second < behind <= third)
    assert calls == {"from the pool": 2, "event": 1}
