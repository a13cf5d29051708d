"""The SIMT device finds faults that are planted in the kernels, in the tests of their verbs, and says where."""

import os
import re
import signal
import subprocess
import sys

import pytest

from mpirun import ROOT

pytestmark = pytest.mark.skipif(
    "MOEMPI_SIMT_OPTIONS" in os.environ or os.environ.get("MOEMPI_TEST_DEVICE") == "cuda",
    reason="the SIMT device finds races if no sanitizer does",
)

NORM = "test_rms_norm_equals_the_cpu[bfloat16-{}-True-2048]"
ROWS = "test_attention_equals_the_cpu[bfloat16-{}-4-4-16-lengths0-whole]"
TILES = "test_attention_equals_the_cpu[bfloat16-{}-4-2-32-lengths2-whole]"
PANELS = "test_attention_equals_the_cpu[bfloat16-{}-2-2-128-lengths3-whole]"
PACKED = "test_rows_are_packed_in_the_order_of_their_experts[bfloat16-{}-64-8-256-24]"
FEW_ROWS = "test_experts_of_few_rows_equal_the_cpu[{}-64-320-1-32]"


def run_planted(test, old, new="", *, order="forwards"):
    """The output of a test, which must fail with the planted fault."""
    done = subprocess.run(
        [
            sys.executable,
            "tests/simt/planted.py",
            old,
            new,
            f"tests/backend/cuda/test_backend.py::{test.format(order)}",
        ],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": "tests:app"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    output = done.stdout + done.stderr
    assert done.returncode in (1, -signal.SIGABRT), output
    return output


@pytest.mark.parametrize(
    ("test", "old", "order", "found"),
    [
        (NORM, "__syncthreads();\n  value = lane", "forwards", r"writes .* rows.cuh:\d+, which another thread reads"),
        (
            ROWS,
            "__syncthreads();\n  score_page(",
            "backwards",
            r"writes .* attention.cu:\d+, which another thread reads",
        ),
        (ROWS, "__syncwarp();\n  for (int head = 0;", "forwards", r"attention.cu:\d+.*, which another thread writes"),
        (PACKED, "__syncthreads();  // the ids", "backwards", r"packing.cu:\d+, which another thread (reads|writes)"),
        (FEW_ROWS, "__syncthreads();  // the chunk", "forwards", r"few_rows.cu:\d+, which another thread reads"),
    ],
)
def test_a_missing_barrier_is_a_race_with_file_and_line(test, old, order, found):
    output = run_planted(test, old, old.partition(";")[2], order=order)
    assert re.search(rf"simt: a race: thread \d+ .*{found} at \w+.cuh?:\d+", output), output


@pytest.mark.parametrize(
    ("test", "old", "file"),
    [(TILES, "await_copies();", "attention_tiles"), (FEW_ROWS, "await_groups_but<STAGES - 2>();", "few_rows")],
)
def test_a_missing_wait_for_a_copy_is_found(test, old, file):
    output = run_planted(test, old)
    assert re.search(rf"to which a copy is begun and not waited for at {file}.cu:\d+", output), output


def test_a_missing_wait_for_a_product_is_found():
    assert "Mismatched elements" in run_planted(PANELS, "await_products_but<1>();  // the scores")


PROGRAM = """
import sys
import numpy as np
from moempi.backend.cuda.device import Kernel
from simt.device import SimtDevice
name = sys.argv[1]
Kernel.source = '''#line 1 "sums.cu"
extern "C" __global__ void ''' + name + '''(int* out) {
  __shared__ int total, same;
  if (threadIdx.x == 0) total = 0;
  __syncthreads();
  atomicAdd(&total, 1), same = 7;
  ''' + "__syncthreads();" * (name == "late") + '''
  out[threadIdx.x] = total + same;
}'''
device = SimtDevice()
out = device.empty((64,), np.int32)
device.launch(Kernel("sums.cu", name), (1, 1, 1), 64, (out,))
print(device.download(out).max())
"""


def test_writes_of_one_value_are_no_race_and_a_sum_beside_a_read_is():
    late, early = (
        subprocess.run(
            [sys.executable, "-c", PROGRAM, name],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": "tests:app"},
            capture_output=True,
            text=True,
            check=False,
        )
        for name in ("late", "early")
    )
    assert (late.returncode, late.stdout) == (0, "71\n"), late.stderr
    assert early.returncode == -signal.SIGABRT
    assert re.search(r"adds to .* sums.cu:5, which another thread reads at sums.cu:7", early.stderr), early.stderr
