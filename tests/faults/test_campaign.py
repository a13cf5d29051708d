"""A short form of the fault campaign; the long one: python tests/faults/campaign.py."""

import pytest

from faults import campaign


@pytest.mark.mpi
def test_every_kind_of_fault_once(tmp_path, capfd):
    tried, passed = campaign.run(seed=0, kills=4, endings=9, flips=6, every=40, folder=tmp_path)
    assert campaign.all_passed(tried, passed), capfd.readouterr().err
    assert {"exception", "SIGSTOP", "SIGKILL at any time", "folder that is a file"} <= tried.keys()
    assert len([name for name in tried if name.startswith("SIG") and name.endswith("at the end")]) == 9
