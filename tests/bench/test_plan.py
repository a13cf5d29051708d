"""`moempi bench plan`: the machine fitted to runs, its predictions, and runs over an emulated link."""

from pathlib import Path

import pytest
from msgspec import structs

from moempi.bench.plan import (
    CALIBRATION_RUNS,
    FREE,
    MODEL,
    PARAMETERS,
    RunShape,
    _Bench,
    _levels,
    _machine,
    _toml,
    fit,
    predict_s,
)
from moempi.config.machine_file import read_machine
from moempi.storage.initialize import initialize


@pytest.mark.parametrize("link", [FREE, (50.0, 0.1)], ids=["free links", "real links"])
def test_a_machine_fitted_to_its_own_predictions_predicts_the_same(tmp_path, link):
    true = structs.replace(_machine((20.0, 0.3, 40.0, 25.0)), levels=_levels(link))
    fitted = fit([(shape, predict_s(shape, true, 2)) for shape in CALIBRATION_RUNS], 2, _levels(link))
    for shape in (*CALIBRATION_RUNS, RunShape(32, lanes=4), RunShape(1), RunShape(8, tensor=2)):
        assert predict_s(shape, fitted, 2) == pytest.approx(predict_s(shape, true, 2), rel=0.01)
    (tmp_path / "machine.toml").write_text(_toml(fitted))
    assert read_machine(tmp_path / "machine.toml") == fitted
    assert all(getattr(fitted, name) > 0 for name in PARAMETERS)


def test_the_time_of_a_slow_link_is_predicted_and_overlap_hides_some_of_it():
    machine = _machine((20.0, 0.3, 40.0, 25.0))
    free, off, on = (
        predict_s(RunShape(32, overlap=overlap, link=link), machine, 2)
        for overlap, link in ((False, (0.0, 1000.0)), (False, (0.0, 0.02)), (True, (0.0, 0.02)))
    )
    # Half of 32 rows' 4 choices cross, there and back, in 3 layers: rows of 1,024 bytes at 20 MB/s.
    assert off - free == pytest.approx(3 * 2 * 32 * 4 / 2 * 1024 / 0.02e9, rel=0.01)
    assert free < on < off


@pytest.mark.ranks(2)
def test_a_run_over_an_emulated_link_takes_the_time_of_the_link(comm, tmp_path):
    from moempi.runtime.world import World

    bench = _Bench(World(comm), Path(comm.bcast(tmp_path)))
    if comm.rank == 0:
        initialize(MODEL, bench.folder / "model.h5", seed=1)
    comm.Barrier()
    link = (0.0, 0.005)
    seconds = bench.seconds(RunShape(8, overlap=False, link=link), 1)
    assert seconds == comm.bcast(seconds)
    # The busiest direction of an exchange carries at least an even share: half of 8 rows' 4 choices.
    assert seconds > 0.8 * 3 * 2 * 8 * 4 / 2 * 1024 / 0.005e9
