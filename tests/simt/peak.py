"""Peak device memory and its forecast, on the SIMT device: `python tests/simt/peak.py run JOB.toml`."""

import json
import sys

from moempi.backend.cuda.backend import CudaBackend
from moempi.cli import main
from moempi.engine import deployment, engine
from simt.device import SimtDevice

device = SimtDevice(pinned=False, eager=True, finds_races=False)
found = {}
rank_layout_on, load_model = deployment.rank_layout_on, engine.load_model


def make_backend(run, *, progress, **_):
    return CudaBackend(device, precision=run.precision, reproducible=run.reproducible, progress=progress)


def watch_layout(*arguments, **named):
    rank_layout = rank_layout_on(*arguments, **named)
    found["memory"] = rank_layout.memory
    return rank_layout


def watch_load(*arguments, pages, **named):
    model = load_model(*arguments, pages=pages, **named)
    memory = found["memory"]
    found["held"] = memory.held - memory.rows + pages * memory.page
    found["loaded"] = device.live_bytes
    device.peak_bytes = device.live_bytes  # the peak of loading does not count
    return model


deployment.make_backend, deployment.rank_layout_on, engine.load_model = make_backend, watch_layout, watch_load

if __name__ == "__main__":
    code = main()
    memory = found.pop("memory")
    print(json.dumps({**found, "forecast": found["held"] + memory.rows, "peak": device.peak_bytes}))
    sys.exit(code)
