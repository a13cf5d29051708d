"""A short form of the soak; the long one: python tests/faults/soak.py."""

import pytest

from faults import soak


@pytest.mark.mpi
def test_nothing_grows_during_a_minute(tmp_path, capfd):
    grown = soak.run(["generate"], minutes=1, folder=tmp_path)
    assert not grown, f"{grown}\n{capfd.readouterr().out}"
