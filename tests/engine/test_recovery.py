"""The line that says how long the recovery from a lost host took."""

import msgspec

from moempi.engine.recovery import Recovery
from moempi.observe.progress import Counts
from moempi.storage.run_state import Loss, write_state
from storage.test_run_state import STOPPED

LOSS = Loss(("n3",), progress_at=100.0, noticed_at=106.5)


def test_a_run_after_another_end_recovers_from_nothing(tmp_path):
    assert Recovery.from_state(str(tmp_path / "r.h5")) is None
    write_state(tmp_path / "r.h5", STOPPED)
    assert Recovery.from_state(str(tmp_path / "r.h5")) is None


def test_a_recovery_lasts_until_the_first_new_token(tmp_path):
    write_state(tmp_path / "r.h5", msgspec.structs.replace(STOPPED, state="failed", loss=LOSS))
    recovery = Recovery.from_state(str(tmp_path / "r.h5"))
    assert recovery is not None
    assert recovery.loss == LOSS
    assert not recovery.is_over(Counts(finished=7))
    assert not recovery.is_over(Counts(finished=7, prompt_tokens=9))
    assert recovery.is_over(Counts(finished=7, prompt_tokens=9, generated=1))


def test_the_line_names_each_part():
    recovery = Recovery(LOSS, started_at=108.0, loaded_at=109.25, token_at=110.0)
    assert recovery.text() == (
        "recovered from the loss of n3: 10.0 s from the last progress to the first new token (6.5 until noticed, "
        "1.5 until the ranks started again, 1.2 loading, 0.8 first steps)"
    )
