"""The CUDA sources compile for every supported architecture, and the SIMT device finds a missing barrier."""

import subprocess

import numpy as np
import pytest

from moempi.arrays import narrow
from moempi.backend.cuda.device import KERNELS, Kernel
from mpirun import ROOT, python
from simt.device import SimtDevice

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
SHAPES = (("EXPERTS", 64), ("IDS", 64), ("HEAD_DIM", 128), ("VALUE_DIM", 128), ("HEADS", 4))
BFLOAT16_ONLY = {"attention_tiles.cu", "attention_warpgroups.cu"}
HOPPER_ONLY = {"attention_warpgroups.cu"}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("precision", [(), (("FLOAT32_ROWS", None),)], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("file", sorted(path.name for path in KERNELS.glob("*.cu")))
def test_nvrtc_compiles_the_kernels(file, precision, architecture):
    if precision and file in BFLOAT16_ONLY:
        pytest.skip("this kernel takes bfloat16 alone")
    if file in HOPPER_ONLY:
        if architecture != "sm_90":
            pytest.skip("this kernel is for compute capability 9.0 alone")
        architecture += "a"
    nvrtc = pytest.importorskip("cupy_backends.cuda.libs.nvrtc")
    kernel = Kernel(file, "", (*precision, *SHAPES))
    program = nvrtc.createProgram(kernel.source, file, [], [])
    try:
        nvrtc.compileProgram(program, ["-std=c++17", "-ftz=true", f"-arch={architecture}", *kernel.defines])
    except nvrtc.NVRTCError:
        pytest.fail(nvrtc.getProgramLog(program), pytrace=False)
    assert nvrtc.getCUBIN(program)


def test_a_missing_barrier_changes_the_result(monkeypatch):
    """Without its barriers a kernel's result depends on the order of threads, so one of the two orders is wrong."""
    source = Kernel("norm.cu", "rms_norm").source
    monkeypatch.setattr(Kernel, "source", source.replace("__syncthreads();", ""))
    rows = np.random.default_rng(1).normal(size=(3, 1024)).astype(np.float32)
    results = []
    for is_reverse in (False, True):
        if is_reverse:
            monkeypatch.setenv("SIMT_REVERSE", "1")
        device = SimtDevice()
        x, weight, out = device.upload(narrow(rows)), device.upload(narrow(rows[0])), device.empty((3, 1024), np.uint16)
        sizes = (np.int32(1), np.int32(1024), np.int64(1024), np.int64(0), np.float32(1e-5), np.int32(1))
        device.launch(Kernel("norm.cu", "rms_norm", (("BROKEN", 1),)), (3, 1, 1), 128, (x, weight, out, *sizes))
        results.append(device.download(out))
    assert (results[0] != results[1]).any()


def test_a_launch_with_wrong_arguments_ends_the_program():
    code = (
        "import numpy as np; from simt.device import SimtDevice; from moempi.backend.cuda.device import Kernel\n"
        "d = SimtDevice(); x = d.empty((4, 8), np.uint16)\n"
        "d.launch(Kernel('packing.cu', 'take_rows'), (4, 1, 1), 32, (x, None, x, np.int64(8)))\n"
        "d.record_event().synchronize()"
    )
    outcome = subprocess.run(
        [str(word) for word in python("-c", code)], cwd=ROOT / "tests", capture_output=True, text=True, check=False
    )
    assert outcome.returncode != 0
    assert "takes (pppi), not (pppl)" in outcome.stderr
