"""What a new attempt learns from the journals of earlier ones, and which changes of a job forbid to continue it."""

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.jobs import make_job
from moempi.config.job import CHANGES_RESULTS, KEEPS_RESULTS
from moempi.engine.restart import NOTHING_EARLIER, Earlier, finished_requests, run_fingerprint
from moempi.errors import NoInputError, StorageError
from moempi.storage.journal import JournalReader, JournalWriter, journal_path
from moempi.storage.records import RankRecord, RequestRecord, RoutingRecord

RANK = RankRecord(rank=0, host="n", expert_load=np.zeros((1, 2), np.int64), seconds={}, steps=1, tokens=2)


def request(index, *, tokens=0, scores=0, finish="length", text="", reference=None):
    return RequestRecord(
        index=index,
        id=f"q{index}",
        finish=finish,
        text=text,
        reference=reference,
        prompt=np.zeros(scores, np.int32),
        score=np.zeros(scores, np.float32),
        tokens=np.zeros(tokens, np.int32),
        logprobs=np.zeros(tokens, np.float32),
    )


def routing(step, *, since=0):
    return RoutingRecord(
        since=since,
        step=step,
        rank=0,
        layers=(1,),
        requests=np.zeros(2, np.int64),
        positions=np.arange(2, dtype=np.int32),
        experts=np.zeros((1, 2, 3), np.int32),
        weights=np.zeros((1, 2, 3), np.float32),
    )


def write_journal(path, *records, fingerprint="run"):
    with JournalWriter(path, fingerprint=fingerprint) as writer:
        for record in records:
            writer.append(record)
    return path


def earlier_of(*journals):
    done, next_step, _ = finished_requests(journals, "run")
    return Earlier.from_finished(done, next_step=next_step)


# The scan


def test_no_journal_and_an_empty_journal_have_finished_nothing(tmp_path):
    for earlier in (NOTHING_EARLIER, earlier_of(), earlier_of(write_journal(tmp_path / "0"))):
        assert (earlier.indices.tolist(), earlier.finishes, earlier.tokens) == ([], {}, 0)
        assert (earlier.referenced, earlier.exact, earlier.next_step) == (0, 0, 0)


def test_finished_requests_of_all_journals_are_counted(tmp_path):
    first = write_journal(
        tmp_path / "0",
        request(4, tokens=3, finish="stop", text="42", reference="42"),
        RANK,
        request(1, tokens=5, text="41", reference="42"),
    )
    second = write_journal(tmp_path / "1", request(0, finish="error", reference="42"), request(7, scores=6, text="42"))
    earlier = earlier_of(first, second)
    assert earlier.indices.tolist() == [0, 1, 4, 7]
    assert earlier.finishes == {"stop": 1, "length": 2, "error": 1}
    assert (earlier.tokens, earlier.referenced, earlier.exact) == (14, 3, 1)
    assert earlier.next_step == 0


def test_a_request_that_several_attempts_finished_counts_once(tmp_path):
    same = request(4, tokens=3, finish="stop", text="42", reference="42")
    earlier = earlier_of(write_journal(tmp_path / "0", same, same), write_journal(tmp_path / "1", same))
    assert (earlier.indices.tolist(), earlier.finishes) == ([4], {"stop": 1})
    assert (earlier.tokens, earlier.referenced, earlier.exact) == (3, 1, 1)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 2)), max_size=25))
def test_no_division_among_journals_changes_what_is_finished(tmp_path_factory, written):
    folder = tmp_path_factory.mktemp("parts")
    kinds = ("stop", "length", "error")
    paths = [
        write_journal(
            folder / str(rank),
            *(request(index, tokens=index, finish=kinds[index % 3]) for index, owner in written if owner == rank),
        )
        for rank in range(3)
    ]
    indices = {index for index, _ in written}
    for order in (paths, paths[::-1]):
        earlier = earlier_of(*order)
        assert earlier.indices.tolist() == sorted(indices)
        assert earlier.tokens == sum(indices)
        assert earlier.finishes.total() == len(indices)
        assert all(earlier.finishes[kind] == sum(index % 3 == k for index in indices) for k, kind in enumerate(kinds))


@pytest.mark.parametrize(("steps", "next_step"), [([0], 1), ([3, 9, 4], 10), ([], 0)])
def test_the_next_step_follows_the_last_one_whose_routing_is_recorded(tmp_path, steps, next_step):
    first = write_journal(tmp_path / "0", *(routing(step) for step in steps))
    second = write_journal(tmp_path / "1", request(0))
    assert finished_requests([first, second], "run")[1] == next_step
    assert finished_requests([second, first], "run")[1] == next_step


def test_a_torn_record_at_the_end_is_passed_over(tmp_path):
    path = write_journal(tmp_path / "0", request(1, tokens=2), request(2, tokens=3))
    path.write_bytes(path.read_bytes()[:-1])
    assert earlier_of(path).indices.tolist() == [1]
    assert finished_requests([path], "run")[2][0].startswith(f"{path} ends with")


def test_requests_behind_damage_are_finished_and_the_damage_is_reported(tmp_path):
    path = write_journal(tmp_path / "0", request(1, tokens=2), request(2, tokens=3), request(3, tokens=1))
    with JournalReader(path) as journal:
        offset = [offset for offset, _ in journal.records()][1]
    octets = bytearray(path.read_bytes())
    octets[offset + 30] ^= 1
    path.write_bytes(octets)
    assert earlier_of(path).indices.tolist() == [1, 3]
    sound = write_journal(tmp_path / "1", request(7))
    problems = finished_requests([path, sound], "run")[2]
    assert problems == [f"{path} is damaged at byte {offset}, the records behind it are kept"]


@pytest.mark.parametrize("position", [0, 1])
def test_a_journal_of_another_run_is_refused_with_its_path(tmp_path, position):
    own = write_journal(journal_path(tmp_path / "r.h5", 0), request(0))
    other = write_journal(journal_path(tmp_path / "r.h5", 1), fingerprint="another")
    journals = [own]
    journals.insert(position, other)
    with pytest.raises(StorageError) as error:
        finished_requests(journals, "run")
    assert str(error.value) == (
        f"{other}: belongs to an unfinished run with other weights, prompts or settings; finish that run, "
        f"remove {tmp_path / 'r.h5'}.parts to give it up, or choose another output.results"
    )


def test_a_file_that_is_no_journal_or_is_missing_is_a_storage_error(tmp_path):
    (tmp_path / "0").write_bytes(b"something else")
    for path in (tmp_path / "0", tmp_path / "1"):
        with pytest.raises(StorageError, match=str(path)):
            finished_requests([path], "run")


# The fingerprint


@pytest.fixture
def job(tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "12+30="}')
    return make_job(tmp_path)


def with_keys(job, section, **keys):
    return msgspec.structs.replace(job, **{section: msgspec.structs.replace(getattr(job, section), **keys)})


def test_the_same_job_has_the_same_fingerprint(job):
    assert run_fingerprint(job, weights="w") == run_fingerprint(with_keys(job, "run"), weights="w")


OTHER_VALUES = {
    "task": "score",
    "run.backend": "numpy",
    "run.precision": "float32",
    "sampling.stop": ("x",),
    "balance.mode": "bias",
    "exchange.transport": "pairwise",
    "exchange.hops": 2,
    "exchange.buffers": "host",
    "run.micro_batches": 5,
    "parallel.stage_layers": (1,),
    "parallel.stage_ranks": (1,),
    "run.kv_memory": "1GB",
    "topology.rank_memory": "1GB",
}


def all_keys(struct, prefix=""):
    """Dotted key and value of every key of a job, sections opened."""
    for name in struct.__struct_fields__:
        value = getattr(struct, name)
        if isinstance(value, msgspec.Struct):
            yield from all_keys(value, f"{name}.")
        else:
            yield f"{prefix}{name}", value


def changed(job, key, value):
    """The job with another valid value of a key."""
    if key in OTHER_VALUES:
        other = OTHER_VALUES[key]
    elif isinstance(value, bool):
        other = not value
    else:
        other = f"other-{value}" if isinstance(value, str) else value + 1 if isinstance(value, int) else value / 2 + 0.3
    section, _, name = key.partition(".")
    return with_keys(job, section, **{name: other}) if name else msgspec.structs.replace(job, **{section: other})


def test_every_key_of_a_job_is_declared_once(job):
    declared = [*CHANGES_RESULTS, *KEEPS_RESULTS]
    assert sorted(declared) == sorted(key for key, _ in all_keys(job))


def test_exactly_the_keys_that_change_results_change_the_fingerprint(job):
    fingerprint = run_fingerprint(job, weights="w")
    for key, value in all_keys(job):
        other = changed(job, key, value)
        assert other != job, key
        if key != "input.prompts":
            assert (run_fingerprint(other, weights="w") != fingerprint) == (key in CHANGES_RESULTS), key


def test_task_weights_and_prompts_change_the_fingerprint(job, tmp_path):
    fingerprints = {
        run_fingerprint(job, weights="w"),
        run_fingerprint(job, weights="x"),
        run_fingerprint(msgspec.structs.replace(job, task="score"), weights="w"),
    }
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "12+31="}')
    fingerprints.add(run_fingerprint(job, weights="w"))
    assert len(fingerprints) == 4


@pytest.mark.parametrize(
    ("section", "keys"),
    [
        ("run", {"micro_batches": 5}),
        ("run", {"overlap": False}),
        ("run", {"max_sequences": 3}),
        ("run", {"batch_tokens": 9}),
        ("run", {"kv_memory": "1GB"}),
        ("run", {"timeout_s": 9.0}),
        ("parallel", {"stages": 2}),
        ("exchange", {"transport": "pairwise", "verify": True}),
        ("topology", {"ranks_per_node": 2}),
        ("placement", {"file": "placement.json"}),
        ("output", {"results": "elsewhere.h5"}),
        ("model", {"weights": "elsewhere.h5"}),
    ],
)
def test_a_run_may_be_continued_with_another_layout(job, section, keys):
    assert run_fingerprint(with_keys(job, section, **keys), weights="w") == run_fingerprint(job, weights="w")


def test_prompts_count_by_content_wherever_they_are(job, tmp_path):
    (tmp_path / "copy.jsonl").write_bytes((tmp_path / "prompts.jsonl").read_bytes())
    copied = with_keys(job, "input", prompts=str(tmp_path / "copy.jsonl"))
    assert run_fingerprint(copied, weights="w") == run_fingerprint(job, weights="w")


def test_prompts_that_cannot_be_read_are_named(job, tmp_path):
    missing = with_keys(job, "input", prompts=str(tmp_path / "missing.jsonl"))
    with pytest.raises(NoInputError, match=r"missing\.jsonl: cannot be read"):
        run_fingerprint(missing, weights="w")
