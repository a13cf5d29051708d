"""`moempi bench gpu`: all figures, at small sizes on the SIMT device; without a GPU it is refused."""

from argparse import ArgumentParser

from moempi.backend.cuda.backend import CudaBackend
from moempi.bench import gpu
from mpirun import mpirun, python
from simt.device import SimtDevice


def test_all_figures_are_measured():
    parser = ArgumentParser()
    gpu.add_flags(parser)
    small = ["--width", "64", "--expert-width", "32", "--heads", "2", "--head-dim", "16", "--context", "70"]
    sizes = parser.parse_args(
        [*small, "--few", "1", "--many", "16", "--sequences", "2", "--rounds", "1", "--repeats", "1"]
    )
    figures = gpu.measure(CudaBackend(SimtDevice(), precision="bfloat16", reproducible=False), sizes)
    names = ["expert", "expert", "pack", "combine", "decode attention", "prefill attention"]
    assert [figure.name for figure in figures] == names
    assert all(figure.seconds > 0 for figure in figures)


def test_without_a_gpu_it_is_a_configuration_error():
    outcome = mpirun(1, *python("-m", "moempi", "bench", "gpu"), CUDA_VISIBLE_DEVICES="")
    assert outcome.code == 78
    assert len(outcome.lines) == 1


def test_check_reports_why_no_gpu_is_used():
    outcome = mpirun(1, *python("-m", "moempi", "check"), CUDA_VISIBLE_DEVICES="")
    assert outcome.code == 0, outcome.err
    assert "no GPU is used" in outcome.out
