"""Recorded values and replay on the simulated CUDA device: the rows of the CPU backend, and the same bits again."""

from contextlib import closing

import h5py
import numpy as np
import pytest

from engine.runs import Run, numpy_backend, requests_of
from engine.test_replay import LENGTHS, LIMIT, named_requests, opened
from moempi.backend.cuda.backend import CudaBackend
from moempi.config.job import ReplaySection
from moempi.storage.merge import merge
from simt.device import SimtDevice
from storage.test_results import PROVENANCE

TRACE = {"statistics": True, "home": True, "hidden": [0, 3], "hidden_norm": True}


def on_gpu(precision):
    return lambda progress: CudaBackend(
        SimtDevice(finds_races=False), precision=precision, reproducible=True, progress=progress
    )


def tables(folder, make_backend, *, requests, replay=None, **sections):
    """All columns that a run records."""
    folder.mkdir()
    run = Run(folder, requests, make_backend=make_backend, replay_of=replay, **sections)
    run.lanes.run()
    run.journal.close()
    merge(folder / "r.h5", [folder / "0.part"], num_requests=len(requests), provenance=PROVENANCE)
    found = {}
    with h5py.File(folder / "r.h5") as file:
        for group in ("routing", "hidden", "score"):
            if group in file:
                file[group].visititems(
                    lambda name, item, group=group: (
                        found.update({f"{group}/{name}": item[:]}) if isinstance(item, h5py.Dataset) else None
                    )
                )
    return found


@pytest.mark.parametrize("hidden_dtype", ["float32", "bfloat16"])
def test_a_gpu_records_the_rows_of_the_cpu(tmp_path, hidden_dtype):
    trace = TRACE | {"hidden_dtype": hidden_dtype}
    cpu = tables(tmp_path / "cpu", numpy_backend, requests=named_requests(), trace=trace)
    gpu = tables(tmp_path / "gpu", on_gpu("float32"), requests=named_requests(), trace=trace)
    assert cpu.keys() == gpu.keys()
    for name, expected in cpu.items():
        within = {"rtol": 2**-7, "atol": 1e-4} if hidden_dtype == "bfloat16" else {"rtol": 0, "atol": 1e-4}
        np.testing.assert_allclose(gpu[name], expected, err_msg=name, **within)
    assert len(gpu["routing/norms"]) == sum(LENGTHS) + len(LENGTHS) * (LIMIT - 1)


def test_rows_in_bfloat16_are_recorded_as_they_are(tmp_path):
    narrow, wide = (
        tables(tmp_path / dtype, on_gpu("bfloat16"), requests=requests_of(5, 9, limit=2), trace=TRACE | dtypes)
        for dtype, dtypes in ((dtype, {"hidden_dtype": dtype}) for dtype in ("bfloat16", "float32"))
    )
    for name, values in narrow.items():
        np.testing.assert_array_equal(wide[name], values, err_msg=name)
    assert np.isfinite(narrow["hidden/values/003"]).all()
    assert (narrow["routing/norms"] > 0).all()


def test_a_gpu_scores_the_likeliest_tokens_of_the_cpu(tmp_path):
    sections = {"task": "score", "score": {"top_n": 6, "threshold": -3.7}}
    cpu, gpu = (
        tables(tmp_path / name, make, requests=requests_of(*LENGTHS, limit=0), **sections)
        for name, make in (("cpu", numpy_backend), ("gpu", on_gpu("float32")))
    )
    np.testing.assert_array_equal(gpu["score/top_tokens"], cpu["score/top_tokens"])
    np.testing.assert_allclose(gpu["score/top_logprobs"], cpu["score/top_logprobs"], rtol=0, atol=1e-5)
    for name in ("offsets", "tokens"):
        np.testing.assert_array_equal(gpu[f"score/above/{name}"], cpu[f"score/above/{name}"])
    np.testing.assert_allclose(gpu["score/above/logprobs"], cpu["score/above/logprobs"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("weights", [False, True])
def test_a_gpu_replays_what_it_recorded_to_the_bit(tmp_path, weights):
    recorded = tables(tmp_path / "one", on_gpu("float32"), requests=named_requests(), trace={"routing": "weights"})
    section = ReplaySection(str(tmp_path / "one/r.h5"), weights=weights)
    replay = opened(section)
    with closing(replay):
        again = tables(
            tmp_path / "two", on_gpu("float32"), requests=named_requests(), replay=replay, trace={"routing": "weights"}
        )
    for name, values in recorded.items():
        np.testing.assert_array_equal(again[name], values, err_msg=name)
