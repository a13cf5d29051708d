"""The CUDA sources compile for every supported architecture, and the SIMT device finds a missing barrier."""

import os
import re
import struct
import subprocess
import sys

import numpy as np
import pytest

from moempi.arrays import narrow
from moempi.backend.cuda.device import KERNELS, Kernel, find_kernel
from mpirun import ROOT
from simt.device import SimtDevice

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
SHAPES = {"EXPERTS": 64, "IDS": 64, "HEAD_DIM": 128, "VALUE_DIM": 128, "HEADS": 4, "ROWS": 64}
HOPPER_ONLY = {"attention_warpgroups.cu", "few_rows.cu"}
BFLOAT16_ONLY = {"attention_tiles.cu", *HOPPER_ONLY}
REGISTERS = 65_536
"""Registers of a multiprocessor: a block of more cannot be launched."""
MOST_THREADS = {
    **dict.fromkeys(("attend_rows", "combine", "rotate", "rotate_into_cache", "rotate_into_latent_cache"), 128),
    **dict.fromkeys(("causal_conv", "delta_rule", "state_space", "take_positions"), 128),
    **dict.fromkeys(("attend_tiles", "group", "multiply_few", "gate_up_few", "choose_positions"), 256),
    **dict.fromkeys(("index_scores",), 64),
    **dict.fromkeys(("rms_norm", "add_rms_norm"), 512),
}
"""Threads of the largest block of a kernel; 1,024 of the others."""


def compile_kernels(file, architecture, constants):
    """Compile a file with CuPy's options, without spills; return the registers of a thread of each kernel."""
    nvrtc = pytest.importorskip("cupy_backends.cuda.libs.nvrtc")
    kernel = Kernel(file, "", tuple(constants.items()))
    program = nvrtc.createProgram(kernel.source, file, [], [])
    options = ["-std=c++17", "-ftz=true", f"-arch={architecture}", "--ptxas-options=-v", *kernel.defines]
    try:
        nvrtc.compileProgram(program, options)
    except nvrtc.NVRTCError:
        pytest.fail(nvrtc.getProgramLog(program), pytrace=False)
    log = nvrtc.getProgramLog(program)
    assert set(re.findall(r"(\d+) bytes spill", log)) == {"0"}, log
    assert "serialized" not in log, log  # the compiler's note when it cannot run matrix instructions in the background
    return dict(re.findall(r"entry function '(\w+)'.*?Used (\d+) registers", log, re.DOTALL))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("precision", [{}, {"FLOAT32_ROWS": None}], ids=["bfloat16", "float32"])
@pytest.mark.parametrize("file", sorted(path.name for path in KERNELS.glob("*.cu")))
def test_nvrtc_compiles_the_kernels_for_blocks_that_can_be_launched(file, precision, architecture):
    if precision and file in BFLOAT16_ONLY:
        pytest.skip("this kernel takes bfloat16 alone")
    if file in HOPPER_ONLY:
        if architecture != "sm_90":
            pytest.skip("this kernel is for compute capability 9.0 alone")
        architecture += "a"
    registers = compile_kernels(file, architecture, {**precision, **SHAPES})
    assert registers
    for name, count in registers.items():
        assert -(-int(count) // 8) * 8 * MOST_THREADS.get(name, 1024) <= REGISTERS, name


@pytest.mark.parametrize("precision", [{}, {"FLOAT32_ROWS": None}], ids=["bfloat16", "float32"])
@pytest.mark.parametrize(
    "shape", [(64, 64, 4), (128, 128, 1), (192, 128, 1), (256, 256, 4), (576, 512, 4), (80, 80, 1), (20, 20, 4)]
)
def test_attention_of_other_shapes_keeps_its_registers(shape, precision):
    constants = dict(zip(("HEAD_DIM", "VALUE_DIM", "HEADS"), shape, strict=True))
    assert "attend_rows" in compile_kernels("attention.cu", "sm_90", {**precision, **constants})


@pytest.mark.parametrize("rows", [16, 32])
def test_experts_of_few_rows_keep_their_registers(rows):
    assert compile_kernels("few_rows.cu", "sm_90a", {"ROWS": rows}).keys() == {"multiply_few", "gate_up_few"}


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
        sizes = (1, 1024, 1024, 0, 1e-5, 1)
        device.launch(Kernel("norm.cu", "rms_norm", (("BROKEN", 1),)), (3, 1, 1), 128, (x, weight, out, *sizes))
        results.append(device.download(out))
    assert (results[0] != results[1]).any()


@pytest.mark.parametrize("waits", [False, True])
def test_an_asynchronous_copy_arrives_when_its_thread_waits(monkeypatch, waits):
    source = (
        Kernel("tensor_core.cuh", "").source
        + """extern "C" __global__ void copy_eight(const unsigned short* from, unsigned short* to, int waits) {
          __shared__ __align__(16) unsigned short held[32 * 8];
          for (int i = 0; i < 8; ++i) held[threadIdx.x * 8 + i] = 0;
          begin_copy(held + threadIdx.x * 8, from + threadIdx.x * 8);
          if (waits) await_copies();
          for (int i = 0; i < 8; ++i) to[threadIdx.x * 8 + i] = held[threadIdx.x * 8 + i];
        }"""
    )
    monkeypatch.setattr(Kernel, "source", source)
    device, rows = SimtDevice(), np.arange(1, 257, dtype=np.uint16)
    out = device.empty((256,), np.uint16)
    kernel = Kernel("tensor_core.cuh", "copy_eight", (("COPY", None),))
    device.launch(kernel, (1, 1, 1), 32, (device.upload(rows), out, waits))
    np.testing.assert_array_equal(device.download(out), rows if waits else 0)


def test_a_launch_with_wrong_arguments_is_an_error():
    device, kernel = SimtDevice(), find_kernel("packing.cu", "take_rows")
    x = device.empty((4, 8), np.uint16)
    for arguments in ((x, None, x), (x, None, x, 8.5), (x, None, x, 1 << 40)):
        with pytest.raises(struct.error):
            device.launch(kernel, (4, 1, 1), 32, arguments)


def test_the_parameters_of_a_kernel_are_those_of_its_source():
    assert find_kernel("packing.cu", "take_rows").parameters == ("Q", "Q", "Q", "i4x")
    with pytest.raises(AssertionError, match=r"packing.cu has no kernel take_row$"):
        _ = find_kernel("packing.cu", "take_row").parameters


@pytest.mark.skipif("-fsanitize" not in os.environ.get("MOEMPI_SIMT_OPTIONS", ""), reason="for tests/sanitize.sh")
@pytest.mark.parametrize(("num_read", "beyond"), [(32, None), (33, "heap-buffer-overflow"), (97, "use-after-poison")])
def test_the_sanitizer_reports_what_a_kernel_reads_beyond_an_array(num_read, beyond):
    """Of `from`, which has 32 numbers, and of the dynamic shared memory, which has 64."""
    program = f"""
import numpy as np
from moempi.backend.cuda.device import Kernel
from mpirun import ROOT
from simt.device import SimtDevice
source = '''
extern "C" __global__ void sum(const float* from, float* to, int count) {{
  DYNAMIC_SHARED(float, held);
  if (threadIdx.x) return;
  for (int i = 0; i < 64; ++i) held[i] = 0;
  for (int i = 0; i < count; ++i) to[0] += count > 64 ? held[i % 65] : from[i];
}}'''
Kernel.source = source
device = SimtDevice()
device.launch(Kernel("edge.cu", "sum"), (1, 1, 1), 32,
              (device.upload(np.ones(32, np.float32)), device.upload(np.zeros(1, np.float32)), {num_read}),
              shared_bytes=256)
device.download(device.empty((1,), np.float32))
"""
    ended = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": f"{ROOT / 'tests'}:{ROOT / 'app'}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ended.returncode == 0) == (beyond is None), ended.stderr
    assert beyond is None or f"AddressSanitizer: {beyond}" in ended.stderr
