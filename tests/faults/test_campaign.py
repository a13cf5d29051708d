"""A short form of the fault campaign; the long one: python tests/faults/campaign.py."""

import shutil

import pytest

import mpirun as launching
from faults import campaign, rehearsal


@pytest.mark.mpi
def test_every_kind_of_fault_once(tmp_path, capfd):
    tried, passed = campaign.run(seed=0, kills=4, endings=9, flips=6, every=40, folder=tmp_path)
    assert campaign.all_passed(tried, passed), capfd.readouterr().err
    assert {"exception", "SIGSTOP", "SIGKILL at any time", "folder that is a file"} <= tried.keys()
    assert len([name for name in tried if name.startswith("SIG") and name.endswith("at the end")]) == 9


class AfterResults(rehearsal.Rehearsal):
    """Its runs are a rank 0 that waits to be killed, and a launcher that then does what `launcher` says in sh."""

    launcher = ""
    has_results = True

    def start(self, results, fault, **_):
        notes = results.parent / "notes"
        notes.mkdir()
        (results.parent / "tmp").mkdir()
        if self.has_results:
            shutil.copy(self.reference, results)
        begin = f"sleep 600 & echo $! >{notes}/new; mv {notes}/new {notes}/0.pid; wait; NOTES={notes}; "
        return launching.start("sh", "-c", begin + self.launcher)


@pytest.fixture(scope="module")
def after_results(tmp_path_factory):
    return AfterResults(tmp_path_factory.mktemp("rehearsal"), num_prompts=4)


@pytest.mark.mpi
@pytest.mark.parametrize(
    ("launcher", "has_results", "error", "said"),
    [
        ("exit 0", True, campaign.AfterEndError, "^$"),
        ("exit 137", True, campaign.AfterEndError, "^$"),
        ("exit 0", False, rehearsal.BrokenError, "exit code 0"),
        ("exit 137", False, rehearsal.BrokenError, "0 lines"),
        ("sleep 600", True, rehearsal.BrokenError, "does not end"),
        ("sleep 30 >&- 2>&- & echo $! >$NOTES/1.pid; exit 137", True, rehearsal.BrokenError, "live on"),
        ("touch $NOTES/../tmp/left; exit 137", True, rehearsal.BrokenError, "temporary files"),
        ("printf 'moempi: %s\\n' one two >&2; exit 1", True, rehearsal.BrokenError, "2 lines"),
    ],
)
def test_only_an_end_without_an_error_is_after_the_end(after_results, monkeypatch, launcher, has_results, error, said):
    if said in ("does not end", "live on"):
        monkeypatch.setattr(rehearsal, "END_S", 5.0)
    after_results.launcher, after_results.has_results = launcher, has_results
    with pytest.raises(error, match=said):
        campaign.kill(after_results, rank=0, ranks_after=1, delay=0.0)
