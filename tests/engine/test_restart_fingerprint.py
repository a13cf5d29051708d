"""Which changes of a job forbid to continue it."""

import msgspec
import pytest

from engine.jobs import make_job
from moempi.config.job import CHANGES_RESULTS, KEEPS_RESULTS
from moempi.engine import inputs
from moempi.errors import NoInputError


@pytest.fixture
def job(tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "12+30="}')
    return make_job(tmp_path)


def with_keys(job, section, **keys):
    return msgspec.structs.replace(job, **{section: msgspec.structs.replace(getattr(job, section), **keys)})


def run_fingerprint(job, *, weights, of_prompts=()):
    return inputs.run_fingerprint(job, weights=weights, inputs=inputs._digest_inputs(job, of_prompts))


def test_the_same_job_has_the_same_fingerprint(job):
    assert run_fingerprint(job, weights="w") == run_fingerprint(with_keys(job, "run"), weights="w")


OTHER_VALUES = {
    "trace.hidden": (1,),
    "task": "score",
    "run.backend": "numpy",
    "run.precision": "float32",
    "run.products": "fast",
    "sampling.stop": ("x",),
    "sampling.defaults": "model",
    "sampling.logit_bias": {5: 1.0},
    "sampling.stop_token_ids": (1,),
    "chat.template_kwargs": {"enable_thinking": False},
    "chat.date": "2025-12-31",
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
        if key not in ("input.prompts", "replay.routing"):  # which count by content
            assert (run_fingerprint(other, weights="w") != fingerprint) == (key in CHANGES_RESULTS), key


def test_task_weights_and_prompts_change_the_fingerprint(job, tmp_path):
    fingerprints = {
        run_fingerprint(job, weights="w"),
        run_fingerprint(job, weights="x"),
        run_fingerprint(msgspec.structs.replace(job, task="score"), weights="w"),
    }
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "12+31="}')
    fingerprints.add(run_fingerprint(job, weights="w"))
    replayed = with_keys(job, "replay", routing=str(tmp_path / "routing.h5"))
    for content in ("one", "another"):
        (tmp_path / "routing.h5").write_text(content)
        fingerprints.add(run_fingerprint(replayed, weights="w"))
        fingerprints.add(
            run_fingerprint(job, weights="w", of_prompts=[str(tmp_path / "routing.h5"), job.input.prompts])
        )
    assert len(fingerprints) == 8


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
