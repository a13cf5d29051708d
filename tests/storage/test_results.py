import json
import subprocess
import sys
from datetime import UTC, datetime
from importlib import import_module
from itertools import pairwise

import h5py
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moempi.errors import DataError, NoInputError, StorageError
from moempi.storage import journal_index, results_layout
from moempi.storage import merge as merging
from moempi.storage.journal import JournalWriter, journal_path, journal_paths, remove_journals
from moempi.storage.merge import Provenance, merge
from moempi.storage.results import ResultFile
from storage.test_records import TEXTS, assert_same, make_rank, make_request, write_journal

PROVENANCE = Provenance(
    job='task = "generate"  # \U0001f9ee\n',
    versions={"moempi": "0.1.0", "numpy": "2"},
    world_size=3,
    hosts=("node0", "node0", "node1"),
    weights="abcd",
    fast_products=True,
    start=datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC),
    end=datetime(2026, 1, 2, 3, 5, 6, tzinfo=UTC),
)


def write_journals(path, *records_by_rank):
    for rank, written in enumerate(records_by_rank):
        write_journal(journal_path(path, rank), written)
    return journal_paths(path)


def merged(path, *records_by_rank, num_requests):
    merge(path, write_journals(path, *records_by_rank), num_requests=num_requests, provenance=PROVENANCE)
    remove_journals(path)
    return path


def read(path):
    with ResultFile(path) as file:
        return list(file.requests())


def assert_requests(path, expected):
    for one, other in zip(expected, read(path), strict=True):
        assert_same(one, other)


def test_requests_are_read_in_input_order(tmp_path):
    requests = [make_request(i, num_prompt=i % 4 + 1, num_tokens=i % 3, top=2 if i % 3 else 0) for i in range(20)]
    requests[5] = make_request(5, num_prompt=0, num_tokens=0, finish="error", error="p.jsonl:6: bad \0")
    requests[6] = make_request(6, reference="\U0001f9ee \0 é")
    path = merged(tmp_path / "r.h5", requests[7::2], [], requests[::2][::-1] + requests[1:7:2], num_requests=20)
    assert_requests(path, requests)
    remove_journals(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["r.h5"]


def test_times_of_requests_come_back_and_files_without_them_are_read(tmp_path):
    times = [(0.25, 1.5), (None, 0.125), (None, None), (0.0, 0.0)]
    requests = [make_request(i, first_token_s=first, end_to_end_s=end) for i, (first, end) in enumerate(times)]
    path = merged(tmp_path / "r.h5", requests, num_requests=len(times))
    assert_requests(path, requests)
    with h5py.File(path, "a") as file:
        np.testing.assert_array_equal(file["requests/first_token_s"], [0.25, np.nan, np.nan, 0])
        assert file["requests/end_to_end_s"].attrs["units"] == b"s"
        file["requests/first_token_s"][:2] = [-1.0, np.inf]
    assert [record.first_token_s for record in read(path)] == [None, np.inf, None, 0.0]
    with h5py.File(path, "a") as file:
        del file["requests/first_token_s"], file["requests/end_to_end_s"]
    assert [record.end_to_end_s for record in read(path)] == [None] * len(times)


def test_arrays_are_stored_as_the_layout_documents(tmp_path):
    requests = [make_request(i, num_tokens=i, top=i, score_top=2, reference="") for i in range(3)]
    path = merged(
        tmp_path / "r.h5", [requests[1], make_rank(0)], [requests[2], requests[0], make_rank(1)], num_requests=3
    )
    with h5py.File(path) as file:
        assert file["requests/id"].asstr()[:].tolist() == ["request-0", "request-1", "request-2"]
        assert file["requests/finish"].asstr()[:].tolist() == ["length"] * 3
        assert file["requests/error"].asstr()[:].tolist() == [""] * 3
        assert "reference" not in file["requests"]
        assert file["prompt/offsets"][:].tolist() == [0, 3, 6, 9]
        assert file["prompt/tokens"][:].tolist() == [0, 1, 2, 1000, 1001, 1002, 2000, 2001, 2002]
        assert file["output/offsets"][:].tolist() == [0, 0, 1, 3]
        assert file["output/tokens"][:].tolist() == [1100, 2100, 2101]
        assert file["output/top_tokens"][:].tolist() == [[1300, -1], [2300, 2301], [2302, 2303]]
        assert np.isnan(file["output/top_logprobs"][0, 1])
        assert np.isnan(file["score/logprobs"][:]).tolist() == [True, False, False] * 3
        assert file["score/top_tokens"][3].tolist() == [1600, 1601]
        assert file["experts/load"][:].tolist() == [[10, 12, 14], [16, 18, 20]]
        assert file["timing/compute"][:].tolist() == [1.0, 2.0]
        assert file["timing/host"].asstr()[:].tolist() == ["node0", "node1"]
        assert {name: file.attrs[name] for name in ("format", "version", "world_size", "weights", "fast_products")} == {
            "format": b"moempi results",
            "version": 1,
            "world_size": 3,
            "weights": b"abcd",
            "fast_products": 1,
        }
        assert file.attrs["job"].decode() == PROVENANCE.job
        assert json.loads(file.attrs["hosts"]) == ["node0", "node1"]
        assert json.loads(file.attrs["versions"])["moempi"] == "0.1.0"
        assert file.attrs["end"] == b"2026-01-02T03:05:06+00:00"


def test_text_is_stored_exactly_and_readably(tmp_path):
    requests = [make_request(i, id=text or "empty", text=text) for i, text in enumerate(TEXTS)]
    path = merged(tmp_path / "r.h5", requests, num_requests=len(TEXTS))
    with h5py.File(path) as file:
        offsets, values = file["output/text/offsets"][:], file["output/text/values"][:]
        exact = [values[a:b].tobytes().decode() for a, b in pairwise(offsets)]
        assert exact == TEXTS
        assert file["output/text/readable"].asstr()[:].tolist() == [text.replace("\0", "\u2400") for text in TEXTS]
    assert [record.id for record in read(path)] == [text or "empty" for text in TEXTS]


def test_no_requests(tmp_path):
    for path, records_by_rank in ((tmp_path / "a" / "none.h5", []), (tmp_path / "empty.h5", [[], []])):
        assert_requests(merged(path, *records_by_rank, num_requests=0), [])
    assert_requests(merged(tmp_path / "ranks.h5", [make_rank(0)], num_requests=0), [])


def test_a_resumed_run_sums_loads_and_keeps_each_timing(tmp_path):
    second = make_rank(0, seconds={"compute": 4.0, "idle": 2.0})
    path = merged(tmp_path / "r.h5", [make_rank(0), second], [make_rank(1)], num_requests=0)
    with h5py.File(path) as file:
        assert file["timing/rank"][:].tolist() == [0, 0, 1]
        np.testing.assert_array_equal(file["timing/compute"][:], [1.0, 4.0, 2.0])
        np.testing.assert_array_equal(file["timing/idle"][:], [np.nan, 2.0, np.nan])
        assert file["experts/load"][0, 0] == 10


def test_a_request_recorded_twice_counts_once_if_its_tokens_agree(tmp_path):
    first, again = make_request(0, text="first"), make_request(0, text="again")
    path = merged(tmp_path / "r.h5", [first], [again], num_requests=1)
    assert read(path)[0].text == "first"


@pytest.mark.parametrize(
    ("records_by_rank", "message"),
    [
        ([[make_request(0), make_request(3)]], "2 of 4 requests have no record, the first is 1"),
        (
            [[make_request(4)]],
            "4 of 4 requests have no record.*of request 4, the job has 4; run the same job again",
        ),
    ],
)
def test_journals_that_cannot_be_merged_are_kept(tmp_path, records_by_rank, message):
    path = tmp_path / "r.h5"
    with pytest.raises(StorageError, match=message):
        merged(path, *records_by_rank, num_requests=4)
    assert len(journal_paths(path)) == len(records_by_rank)
    assert not path.exists()


def test_a_torn_journal_is_named_when_a_request_is_missing(tmp_path):
    path = tmp_path / "r.h5"
    journals = write_journals(path, [make_request(0), make_request(1)])
    journals[0].write_bytes(journals[0].read_bytes()[:-1])
    with pytest.raises(StorageError, match=r"the first is 1; .*rank-00000\.part ends with \d+ torn bytes"):
        merge(path, journals, num_requests=2, provenance=PROVENANCE)


def test_a_merge_that_is_refused_at_its_end_keeps_the_earlier_results(tmp_path):
    path = merged(tmp_path / "r.h5", [make_request(0, text="earlier")], num_requests=1)
    before, journals = path.read_bytes(), write_journals(path, [make_request(0, text="later")])

    def refuse(written):
        assert written.parent == tmp_path
        raise StorageError("another run may write it")

    with pytest.raises(StorageError, match="another run"):
        merge(path, journals, num_requests=1, provenance=PROVENANCE, before_replace=refuse)
    assert path.read_bytes() == before
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["r.h5", "r.h5.parts"]


def test_journals_of_different_runs_are_refused(tmp_path):
    path = tmp_path / "r.h5"
    write_journal(journal_path(path, 0), [make_request(0)], fingerprint="one")
    write_journal(journal_path(path, 1), [make_request(1)], fingerprint="two")
    with pytest.raises(StorageError, match="another run"):
        merge(path, journal_paths(path), num_requests=2, provenance=PROVENANCE)


def test_more_journals_than_are_open_at_once_and_many_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(journal_index, "MAX_OPEN_JOURNALS", 2)
    monkeypatch.setattr(results_layout, "BLOCK_BYTES", 1000)
    requests = [make_request(i, num_prompt=1 + 50 * (i % 5)) for i in range(40)]
    assert_requests(merged(tmp_path / "r.h5", *(requests[k::5] for k in range(5)), num_requests=40), requests)


def test_a_failed_merge_keeps_the_existing_file(tmp_path):
    path = merged(tmp_path / "r.h5", [make_request(0)], num_requests=1)
    before = path.read_bytes()
    with pytest.raises(StorageError):
        merged(path, [make_request(1)], num_requests=2)
    assert path.read_bytes() == before


FULL_DISK = """
import resource, sys
from pathlib import Path
from storage.test_results import PROVENANCE, merge, journal_paths, StorageError
path = Path(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
try:
    merge(path, journal_paths(path), num_requests=30, provenance=PROVENANCE)
except StorageError as error:
    print(error)
"""


@pytest.mark.parametrize("limit_bytes", [0, 100, 5_000, 60_000, 200_000, 250_000])
def test_a_full_disk_is_one_clear_error(tmp_path, limit_bytes):
    path = tmp_path / "r.h5"
    write_journals(path, [make_request(i, num_tokens=1000, text="x" * 3000) for i in range(30)])
    run = [sys.executable, "-c", FULL_DISK, str(path), str(limit_bytes)]
    ended = subprocess.run(run, env={"PYTHONPATH": "tests"}, capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert ended.stdout.startswith(f"{path}: cannot be written")
    assert [entry.name for entry in tmp_path.iterdir()] == ["r.h5.parts"]


def test_the_reserved_space_suffices_and_is_freed(tmp_path, monkeypatch):
    reserved = []
    monkeypatch.setattr(merging, "reserve", lambda path, num_bytes: reserved.append(num_bytes))
    requests = [make_request(i, top=3, score_top=2, reference="y" * 50, text="\0" * i) for i in range(300)]
    path = merged(tmp_path / "r.h5", requests, [make_rank(i) for i in range(50)], num_requests=300)
    assert path.stat().st_size < reserved[0]
    assert merged(tmp_path / "s.h5", requests, num_requests=300).stat().st_size < path.stat().st_size


@pytest.fixture
def xarray():
    """Imported when a test needs it: it takes longer than all else that is collected."""
    return import_module("xarray")


def test_xarray_opens_it(tmp_path, xarray):
    requests = [make_request(i, top=2, score_top=3, reference="y") for i in range(4)]
    path = merged(tmp_path / "r.h5", requests, [make_rank(0), make_rank(1)], num_requests=4)
    with xarray.open_datatree(path, engine="h5netcdf") as tree:
        assert tree["requests/id"].dims == ("request",)
        assert tree["requests/id"].to_numpy().tolist() == [f"request-{i}" for i in range(4)]
        assert tree["output/top_tokens"].dims == ("output_token", "top")
        assert tree["score/top_logprobs"].dims == ("prompt_token", "score_top")
        assert tree["experts/load"].dims == ("layer", "expert")
        assert tree["timing/compute"].attrs == {"long_name": "time of the rank in compute", "units": "s"}
        for group in tree.subtree:
            for variable in group.data_vars.values():
                assert variable.attrs.keys() >= {"units", "long_name"}
                assert not any(str(dim).startswith("phony") for dim in variable.dims)


def test_xarray_opens_each_group_by_itself(tmp_path, xarray):
    requests = [make_request(i, top=2, score_top=3, metadata="{}", endpoint="/v1/x", prompt_id="a") for i in range(4)]
    path = merged(tmp_path / "r.h5", requests, [make_rank(0, hosted={1: (0, 2)}, place={"seat": 0})], num_requests=4)
    groups = []
    with h5py.File(path) as file:
        file.visititems(lambda name, found: groups.append(name) if isinstance(found, h5py.Group) else None)
    assert len(groups) > 8
    for group in ["/", *groups]:
        with xarray.open_dataset(path, group=group, engine="h5netcdf") as dataset:
            assert not any(str(dim).startswith("phony") for dim in dataset.dims), group
            dataset.load()
    with xarray.open_datatree(path, engine="h5netcdf") as tree:
        output = tree["output"].to_dataset(inherit=False).drop_dims(["request_bound", "top"])
        assert len(output.to_dataframe()) == sum(len(request.tokens) for request in requests)
    with xarray.open_dataset(path, group="experts", engine="h5netcdf") as experts:
        assert experts["load"].sel(layer=1).to_numpy().tolist() == [3, 4, 5]
        assert experts.sizes == {"layer": 1, "expert": 3}


def test_the_loads_have_a_row_for_each_layer_in_which_any_rank_hosts_experts(tmp_path):
    load = np.arange(12, dtype=np.int64).reshape(4, 3)
    ranks = [make_rank(rank, expert_load=load, hosted={layer: (0,)}) for rank, layer in enumerate((3, 1))]
    path = merged(tmp_path / "r.h5", *([rank] for rank in ranks), num_requests=0)
    with h5py.File(path) as file:
        assert file["experts/layer"][:].tolist() == [1, 3]
        assert file["experts/load"][:].tolist() == (2 * load[[1, 3]]).tolist()


def test_xarray_opens_an_empty_one(tmp_path, xarray):
    path = merged(tmp_path / "r.h5", num_requests=0)
    with xarray.open_datatree(path, engine="h5netcdf") as tree:
        assert tree.sizes["request"] == 0


def drop(file, name):
    del file[name]


def shift_offsets(file, name):
    file[name][1] = 99


def retype(file, name):
    rows = file[name][:].astype(np.int64)
    del file[name]
    file[name] = rows


def link(file, name):
    del file[name]
    file[name] = h5py.ExternalLink("elsewhere.h5", "/x")


def spoil(file, name):
    file[name][0] = 0xFF


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (drop, "requests/utf8/id"),
        (drop, "prompt/offsets"),
        (drop, "output/text"),
        (shift_offsets, "output/offsets"),
        (retype, "output/tokens"),
        (link, "output/tokens"),
        (spoil, "output/text/values"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, change, name):
    path = merged(tmp_path / "r.h5", [make_request(0, text="a"), make_request(1, text="b")], num_requests=2)
    with h5py.File(path, "r+") as file:
        change(file, name)
    with pytest.raises(DataError, match=str(path)):
        read(path)


def test_a_file_that_is_not_a_results_file_is_refused(tmp_path):
    with pytest.raises(NoInputError):
        ResultFile(tmp_path / "missing.h5")
    with h5py.File(tmp_path / "other.h5", "w"):
        pass
    with pytest.raises(DataError, match="not a results file"):
        ResultFile(tmp_path / "other.h5")


sizes = st.tuples(st.integers(0, 4), st.integers(0, 4), st.integers(0, 3), st.integers(0, 3), st.text(max_size=8))


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(shapes=st.lists(sizes, max_size=6), num_ranks=st.integers(1, 3), order=st.randoms())
def test_any_requests_are_read_as_written(tmp_path, shapes, num_ranks, order):
    requests = [
        make_request(i, num_prompt=n, num_tokens=m, top=m and top, score_top=n and score_top, id=text, text=text)
        for i, (n, m, top, score_top, text) in enumerate(shapes)
    ]
    mixed = order.sample(requests, len(requests))
    path = merged(tmp_path / "r.h5", *(mixed[k::num_ranks] for k in range(num_ranks)), num_requests=len(requests))
    assert_requests(path, requests)


def test_a_writer_continues_the_journal_of_an_unfinished_run(tmp_path):
    path = tmp_path / "r.h5"
    write_journals(path, [make_request(0)], [make_request(2)])
    with JournalWriter(journal_path(path, 0), fingerprint="run") as writer:
        writer.append(make_request(1))
    merge(path, journal_paths(path), num_requests=3, provenance=PROVENANCE)
    assert_requests(path, [make_request(i) for i in range(3)])


@pytest.mark.parametrize("path", ["prompt/tokens", "output/logprobs", "requests/utf8/id/values", "output/offsets"])
def test_numbers_of_a_size_that_numpy_does_not_have_are_refused(tmp_path, path):
    merged(tmp_path / "r.h5", [make_request(0), make_rank(0)], num_requests=1)
    kind = h5py.h5t.STD_I32LE.copy()
    kind.set_size(3)
    creation = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    creation.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    with h5py.File(tmp_path / "r.h5", "r+") as file:
        shape = file[path].shape
        del file[path]
        h5py.h5d.create(file.id, path.encode(), kind, h5py.h5s.create_simple(shape), creation)
    with pytest.raises(DataError, match=rf"r\.h5: {path}: damaged or not as written"):
        read(tmp_path / "r.h5")
