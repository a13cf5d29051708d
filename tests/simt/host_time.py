"""The host's CPU time for a decode layer, by the engine's own path on a device that computes nothing.

`PYTHONPATH=tests:app python tests/simt/host_time.py [latent] [capture]` prints microseconds a layer of a rank alone in
its stage, which hosts the layer's one expert, and what the layer asks of the device. Its arrays are CuPy's; the calls
of CUDA are missing. The time of a layer is the difference between models of 18 and of 2 layers.
"""

import gc
import json
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import cupy
import numpy as np
from msgspec import structs

from engine import runs
from engine.test_launches import ARCHITECTURE, LATENT
from moempi.backend.cuda.backend import CudaBackend
from moempi.backend.cuda.device import Graph
from simt.device import SimtDevice

SEQUENCES, PROMPT, NEW_TOKENS, FEW_LAYERS, LAYERS, ROUNDS = 32, 4, 60, 2, 18, 9
MEMORY = cupy.cuda.UnownedMemory(np.zeros(1, np.uint8).ctypes.data, 1 << 40, None, 0)
NOWHERE = cupy.cuda.MemoryPointer(MEMORY, 0)
"""The address of all arrays, which nobody reads."""


class Done:
    """An event that is done."""

    def is_done(self):
        return True

    def synchronize(self):
        """Wait for nothing."""


class IdleDevice(SimtDevice):
    """A device whose work is done when it is submitted, with no results but the counts of a layer's one expert."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()
        self.counts, self.num_choices = {}, 0

    def empty(self, shape, dtype):
        self.calls["allocations"] += 1
        return cupy.ndarray(shape, dtype, NOWHERE)

    def holds(self, values):
        return isinstance(values, cupy.ndarray)

    def upload(self, values):
        self.calls["uploads"] += 1
        return cupy.ndarray(values.shape, values.dtype, NOWHERE)

    def start_download(self, values):
        self.calls["downloads"] += 1
        return np.full(values.shape, self.num_choices if id(values) in self.counts else 0, values.dtype)

    def download(self, values):
        self.calls["waits"] += 1
        return self.start_download(values)

    def record_event(self):
        self.calls["events"] += 1
        return Done()

    def launch(self, kernel, grid, threads, arguments, **options):
        self.calls["submissions"] += 1
        self.calls["steps"] += kernel.name == "rope_angles"
        if kernel.name == "pack_choices":
            counts, self.num_choices = arguments[6:8]
            self.counts[id(counts)] = counts

    def product(self, x, matrix, out, **options):
        self.calls["submissions"] += 1

    def products(self, x, matrices, out):
        self.calls["submissions"] += 1

    def copy(self, values, out):
        self.calls["submissions"] += 1

    def capture(self, submit):
        calls = self.calls.copy()
        submit()
        self.calls = calls
        return Graph(None, ())

    def launch_graph(self, graph):
        self.calls["submissions"] += 1


def measure(attention, layers, *, capture, new_tokens=NEW_TOKENS):
    """Seconds of CPU of a run without its start, and what it asked of the device."""
    device = IdleDevice()

    def make_backend(progress):
        return CudaBackend(device, precision="bfloat16", reproducible=False, capture=capture, progress=progress)

    experts = structs.replace(ARCHITECTURE.experts, num=1, router=structs.replace(ARCHITECTURE.experts.router, top_k=1))
    architecture = structs.replace(ARCHITECTURE, attention=attention, experts=experts, num_layers=layers)
    requests = runs.requests_of(*[PROMPT] * SEQUENCES, limit=new_tokens)
    settings = {"batch_tokens": PROMPT * SEQUENCES, "micro_batches": 1, "precision": "bfloat16"}
    with TemporaryDirectory() as folder:
        run = runs.Run(Path(folder), requests, architecture=architecture, make_backend=make_backend, run=settings)
        device.calls.clear()
        gc.collect()
        gc.disable()
        begin = time.process_time()
        run.lanes.run()
        taken = time.process_time() - begin
        gc.enable()
        run.journal.close()
    return taken, device.calls


def main():
    """Measure, and print one line of JSON."""
    attention = LATENT if "latent" in sys.argv[1:] else ARCHITECTURE.attention
    runs.PAGES = 4 * SEQUENCES
    measure_run = partial(measure, attention, capture="capture" in sys.argv[1:])
    measure_run(LAYERS, new_tokens=2)  # what happens once a process
    times = []
    for _ in range(ROUNDS):
        (few_s, few), (many_s, many) = measure_run(FEW_LAYERS), measure_run(LAYERS)
        num_layers = few["steps"] * (LAYERS - FEW_LAYERS)
        times.append((many_s - few_s) / num_layers * 1e6)
    calls = {name: round((many[name] - few[name]) / num_layers, 1) for name in many if name != "steps"}
    print(json.dumps({"median_us": round(median(times), 1), "least_us": round(min(times), 1), **calls}))


if __name__ == "__main__":
    main()
