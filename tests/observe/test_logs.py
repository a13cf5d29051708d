"""Log files of ranks."""

import logging

import pytest

from hostile import HOSTILE, assert_printable
from moempi.errors import StorageError
from moempi.observe.logs import log_to_files, logs_folder
from mpirun import execute, python


@pytest.fixture(autouse=True)
def _no_handlers_left():
    yield
    logger = logging.getLogger("moempi")
    for handler in logger.handlers[:]:
        logger.removeHandler(handler)
        handler.close()


def test_a_rank_with_a_warning_writes_its_own_file_beside_the_results(tmp_path, capsys):
    results = tmp_path / "folder" / "a.h5"
    log_to_files(results, 0)
    log_to_files(results, 3)
    path = logs_folder(results) / "rank-00003.log"
    logging.getLogger("moempi.engine").info("transport shared")
    assert not path.exists()
    logging.getLogger("moempi.engine").warning("slow disk")
    assert path == tmp_path / "folder" / "a.h5.logs" / "rank-00003.log"
    assert "WARNING moempi.engine: slow disk" in path.read_text()
    assert "transport" not in path.read_text()
    assert capsys.readouterr().err == ""


def test_rank_0_removes_the_logs_of_earlier_runs(tmp_path):
    for rank in (0, 3):
        log_to_files(tmp_path / "a.h5", rank)
        logging.getLogger("moempi").warning("of an earlier run")
    log_to_files(tmp_path / "a.h5", 0)
    logging.getLogger("moempi").info("quiet")
    assert [path.name for path in logs_folder(tmp_path / "a.h5").iterdir()] == ["rank-00000.log"]
    assert "earlier" not in (logs_folder(tmp_path / "a.h5") / "rank-00000.log").read_text()


def test_a_warning_for_which_no_file_can_be_made_ends_nothing(tmp_path, capsys):
    log_to_files(tmp_path / "a.h5", 3)
    logging.getLogger("moempi").warning("its folder is gone")
    assert capsys.readouterr().err == ""


def test_rank_0_also_warns_on_stderr(tmp_path, capsys):
    log_to_files(tmp_path / "a.h5", 0)
    logging.getLogger("moempi").info("quiet")
    logging.getLogger("moempi").warning("loud")
    assert capsys.readouterr().err == "moempi: loud\n"


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "a.h5.logs").write_text("a file")
    with pytest.raises(StorageError, match=r"a\.h5\.logs"):
        log_to_files(tmp_path / "a.h5", 0)


def test_a_record_is_one_printable_line(tmp_path, capsys):
    log_to_files(tmp_path / "a.h5", 0)
    logging.getLogger("moempi").warning("%s: torn", f"{HOSTILE}\0\udcff")
    in_file, on_stderr = (logs_folder(tmp_path / "a.h5") / "rank-00000.log").read_text(), capsys.readouterr().err
    for text in (in_file, on_stderr):
        assert_printable(text)
        assert text.count("\n") == 1
        assert text.endswith("\\x00\\udcff: torn\n")


def test_warnings_before_the_log_files_are_lines_too():
    program = """
import logging, sys
from moempi.observe.logs import log_to_stderr
log_to_stderr()
logging.getLogger("moempi.storage").warning(sys.argv[1])
"""
    err = execute(*python("-c", program, HOSTILE)).err
    assert_printable(err)
    assert err.startswith("moempi: a\\x01")
    assert err.count("\n") == 1
