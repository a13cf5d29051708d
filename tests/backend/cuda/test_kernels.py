"""The CUDA sources compile for every supported architecture, and the SIMT device finds wrong launches."""

import os
import struct
import subprocess
import sys

import numpy as np
import pytest

from backend.cuda.ptxas import HOPPER_ONLY, PRECISIONS, SHAPES, compilations, compile_kernels, table, variants
from moempi.backend.cuda.device import KERNELS, Kernel, find_kernel
from mpirun import ROOT
from simt.device import SimtDevice

REGISTERS = 65_536
"""Registers of a multiprocessor: a block of more cannot be launched."""
MOST_THREADS = {
    **dict.fromkeys(("attend_rows", "combine", "pack_choices", "rotate", "rotate_into_cache"), 128),
    **dict.fromkeys(("causal_conv", "delta_rule", "state_space", "take_positions"), 128),
    **dict.fromkeys(("attend_tiles", "group", "multiply_few", "gate_up_few", "choose_positions"), 256),
    **dict.fromkeys(("index_scores",), 64),
    **dict.fromkeys(("rms_norm", "add_rms_norm", "combine_rms_norm", "extend_latent_cache"), 512),
}
"""Threads of the largest block of a kernel; 1,024 of the others."""


@pytest.mark.parametrize("architecture", ["sm_80", "sm_100"])
@pytest.mark.parametrize(
    ("file", "precision"), list(compilations({path.name for path in KERNELS.glob("*.cu")} - HOPPER_ONLY))
)
def test_nvrtc_compiles_the_kernels_for_blocks_that_can_be_launched(file, precision, architecture):
    pytest.importorskip("cupy")
    found = compile_kernels(file, architecture, PRECISIONS[precision] | SHAPES)
    assert found
    for kernel, resources in found.items():
        assert_launchable(kernel, resources)


def assert_launchable(kernel, resources):
    assert -(-resources.registers // 8) * 8 * MOST_THREADS.get(kernel, 1024) <= REGISTERS, kernel


@pytest.mark.parametrize(("name", "file", "constants"), [pytest.param(*given, id=given[0]) for given in variants()])
def test_the_kernels_of_an_h100_take_no_more_registers_than_the_table_says(name, file, constants):
    pytest.importorskip("cupy")
    found = compile_kernels(file, "sm_90a" if file in HOPPER_ONLY else "sm_90", constants)
    allowed = {row.rsplit(maxsplit=1)[1]: most for row, most in table().items() if row.startswith(f"{name} ")}
    assert found.keys() == allowed.keys()
    for kernel, resources in found.items():
        assert all(number <= most for number, most in zip(resources, allowed[kernel], strict=True)), (kernel, resources)
        assert_launchable(kernel, resources)


def test_every_row_of_the_table_is_of_a_compilation():
    names = [name for name, _, _ in variants()]
    assert not [row for row in table() if not any(row.startswith(f"{name} ") for name in names)]


def test_registers_that_spill_are_found(monkeypatch):
    """The planted fault: blocks of 1,024 threads, two at a time, leave 32 registers for a thread."""
    pytest.importorskip("cupy")
    source = Kernel("attention.cu", "").source
    assert "__launch_bounds__(THREADS, LEAST_BLOCKS)" in source
    crowded = source.replace("__launch_bounds__(THREADS, LEAST_BLOCKS)", "__launch_bounds__(1024, 2)")
    monkeypatch.setattr(Kernel, "source", crowded)
    with pytest.raises(AssertionError, match=r"[1-9]\d* bytes spill stores"):
        compile_kernels("attention.cu", "sm_90", SHAPES)


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
