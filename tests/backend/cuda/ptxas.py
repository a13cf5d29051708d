"""What the compiler makes of the kernels for an H100, without a GPU: `python tests/backend/cuda/ptxas.py` prints it.

`ptxas.txt` has the registers, bytes of stack and bytes of static shared memory that each kernel may take.
"""

import re
from pathlib import Path
from typing import NamedTuple

import pytest

from moempi.backend.cuda.device import KERNELS, Kernel

TABLE = Path(__file__).with_suffix(".txt")
SHAPES = {"EXPERTS": 64, "IDS": 64, "HEAD_DIM": 128, "VALUE_DIM": 128, "HEADS": 4, "ROWS": 64}
HOPPER_ONLY = {"attention_warpgroups.cu", "few_rows.cu"}
BFLOAT16_ONLY = {"attention_tiles.cu", *HOPPER_ONLY}
PRECISIONS = {
    "bfloat16": {},
    "bfloat16,float32-weights": {"FLOAT32_WEIGHTS": 1},  # norms beside bfloat16 rows
    "float32": {"FLOAT32_ROWS": None},
}
MORE_SHAPES = {
    "attention.cu": [
        {"HEAD_DIM": key, "VALUE_DIM": value, "HEADS": heads}
        for key, value, heads in ((64, 64, 4), (128, 128, 1), (192, 128, 1), (256, 256, 4), (576, 512, 4))
    ],
    "router.cu": [{"EXPERTS": experts} for experts in (256, 512)],
    "few_rows.cu": [{"ROWS": rows} for rows in (16, 32)],
}


class Resources(NamedTuple):
    """Registers and bytes of stack of a thread, and bytes of static shared memory of a block."""

    registers: int
    stack: int
    shared: int


def compile_kernels(file, architecture, constants):
    """The resources of each kernel of a file, compiled with the program's options; fails if one spills registers."""
    from cupy_backends.cuda.libs import nvrtc

    from moempi.backend.cuda.compiled_kernel import OPTIONS

    kernel = Kernel(file, "", tuple(constants.items()))
    program = nvrtc.createProgram(kernel.source, file, [], [])
    try:
        nvrtc.compileProgram(program, [*OPTIONS, f"-arch={architecture}", "--ptxas-options=-v", *kernel.defines])
    except nvrtc.NVRTCError:
        pytest.fail(nvrtc.getProgramLog(program), pytrace=False)
    log = nvrtc.getProgramLog(program)
    assert set(re.findall(r"(\d+) bytes spill", log)) == {"0"}, log
    assert "serialized" not in log, log  # the compiler's note when it cannot run matrix instructions in the background
    found = {}
    for entry in log.split("Compiling entry function")[1:]:
        shared = re.search(r"(\d+) bytes smem", entry)
        numbers = (re.search(pattern, entry)[1] for pattern in (r"Used (\d+) registers", r"(\d+) bytes stack"))
        found[re.search(r"'(\w+)'", entry)[1]] = Resources(*map(int, numbers), int(shared[1]) if shared else 0)
    return found


def compilations(files):
    """Each file with each of the precisions for which the program compiles it."""
    for file in sorted(files):
        for precision in PRECISIONS:
            has_weights = "norm_weight" in (KERNELS / file).read_text()
            if precision == "bfloat16" or (file not in BFLOAT16_ONLY and (precision == "float32" or has_weights)):
                yield file, precision


def variants():
    """The file and the constants of each compilation of the table, with a name."""
    for file, precision in compilations(path.name for path in KERNELS.glob("*.cu")):
        for shape in ({}, *MORE_SHAPES.get(file, ())):
            source = Kernel(file, "").source
            used = {key: value for key, value in (SHAPES | shape).items() if re.search(rf"\b{key}\b", source)}
            name = " ".join([file, precision, *(f"{key}={value}" for key, value in used.items())])
            yield name, file, {**PRECISIONS[precision], **used}


def table():
    """The rows of `ptxas.txt`: what the kernels of each compilation may take, by the compilation and the kernel."""
    rows = (line.rsplit(maxsplit=3) for line in TABLE.read_text().splitlines() if not line.startswith("#"))
    return {name: Resources(*map(int, numbers)) for name, *numbers in rows}


if __name__ == "__main__":
    print("# file, precision, constants, kernel: registers, bytes of stack, bytes of static shared memory; for sm_90")
    for name, file, constants in variants():
        kernels = compile_kernels(file, "sm_90a" if file in HOPPER_ONLY else "sm_90", constants)
        for kernel, resources in kernels.items():
            print(name, kernel, *resources)
