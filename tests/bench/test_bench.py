"""The benchmarks run on tiny layers, and print a row for each measurement."""

from importlib.util import find_spec

import pytest

from moempi.bench.start import PARTS
from moempi.fitting import LAWS
from mpirun import ROOT, python

TINY = ("--width", "32", "--expert-width", "16", "--experts", "4", "--top-k", "2")


def require_80_columns(outcome):
    assert outcome.code == 0, outcome.err
    assert max(map(len, outcome.out.splitlines())) <= 80


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_layer_prints_both_precisions(runner, num_ranks):
    outcome = runner(num_ranks).run("bench", "layer", *TINY, "--tokens", "8", "3", "--rounds", "2")
    require_80_columns(outcome)
    assert outcome.out.count("float32") == outcome.out.count("bfloat16") == 2
    assert "T 8, precision float32, moempi ms " in outcome.out
    assert f"{num_ranks} ranks on 1 nodes" in outcome.out.replace("\n", " ")


def test_product_prints_shares_of_what_a_core_can_do(mpirun, runner):
    command = ("bench", "product", "--inputs", "64", "--outputs", "48", "--rows", "1", "3")
    outcome = runner(1, module="bench.small_product").run(*command, "--rounds", "1")
    require_80_columns(outcome)
    text = outcome.out.replace("\n", " ")
    assert text.count(" of peak ") == text.count(" of reading ") >= 4
    assert mpirun(2, *python("-m", "moempi", *command)).code == 64


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_exchange_prints_every_transport(runner, num_ranks):
    outcome = runner(num_ranks).run("bench", "exchange", "--rows", "1", "2", "--rounds", "3")
    require_80_columns(outcome)
    for text in ("bytes per pair 14,336, transport alltoallv, us ", "28,672"):
        assert text in outcome.out


def test_overlap_prints_figures_and_a_timeline(mpirun):
    flags = (*TINY, "--tokens", "6", "--layers", "2", "--passes", "2")
    outcome = mpirun(2, *python("-m", "moempi", "bench", "overlap", *flags), COLUMNS="200")
    assert outcome.code == 0, outcome.err
    assert "same bits with overlap on and off" in outcome.out
    timeline = [line for line in outcome.out.splitlines() if line.startswith("lane ")]
    assert [line[:16] for line in timeline] == [
        f"lane {lane} {what}" for lane in range(2) for what in ("computes ", "on a link")
    ]
    assert all("█" in line for line in timeline[::2])
    assert all("─" in line for line in timeline[1::2])
    alone = mpirun(1, *python("-m", "moempi", "bench", "overlap", *flags))
    assert (alone.code, len(alone.lines)) == (64, 1)


def test_immediate_measures_two_stages_and_refuses_an_odd_number_of_ranks(mpirun):
    command = python("-m", "moempi", "bench", "immediate", *TINY, "--tokens", "0", "3", "--rounds", "2")
    outcome = mpirun(4, *command)
    require_80_columns(outcome)
    assert "2 stages of 2 ranks" in outcome.out
    odd = mpirun(3, *command)
    assert odd.code == 64
    assert len(odd.lines) == 1
    assert "3 ranks do not form two equal ones" in odd.lines[0]


def test_record_prints_what_each_recorded_table_costs_on_one_rank(mpirun, tmp_path):
    (tmp_path / "few.jsonl").write_text("".join((ROOT / "jobs/abacus.jsonl").read_text().splitlines(keepends=True)[:6]))
    command = python("-m", "moempi", "bench", "record", "--rounds", "1", "--prompts", tmp_path / "few.jsonl")
    outcome = mpirun(1, *command, "--model", ROOT / "weights/abacus")
    require_80_columns(outcome)
    for name in ("nothing", "routing, experts", "hidden states of a layer", "top-20", "tokens above -5", "statistics"):
        assert f" {name} " in outcome.out
    assert mpirun(2, *command).code == 64


@pytest.mark.parametrize("flags", [(), ("--compute", "--stage-ranks", "1")])
def test_start_prints_what_each_part_takes_on_each_number_of_ranks_and_how_it_grows(mpirun, flags):
    outcome = mpirun(3, *python("-m", "moempi", "bench", "start", *flags))
    require_80_columns(outcome)
    names = (*PARTS, "all")
    rows = [row for row in map(str.split, outcome.out.splitlines()) if row[:1] and row[0] in {*names, "MB"}]
    assert [row[0] for row in rows] == [*names, "MB", *names, *names]
    for _, on_one, on_two, *grows in rows:
        law, on_many = grows or ("const", "0")
        assert law in LAWS
        assert min(map(float, (on_one, on_two, on_many))) >= 0


def test_a_wrong_flag_is_a_usage_error(mpirun):
    outcome = mpirun(1, *python("-m", "moempi", "bench", "layer", "--tokns", "8"))
    assert outcome.code == 64
    assert len(outcome.lines) == 1
    assert "--tokns" in outcome.lines[0]


@pytest.mark.parametrize(
    ("name", "flags", "agrees"),
    [
        ("generate", ("--sequences", "2", "--prompt", "4", "--tokens", "3"), lambda same: same == "100.0%"),
        ("score", ("--prompts", "2", "--tokens", "5"), lambda difference: float(difference) < 1e-4),
    ],
)
def test_generate_and_score_agree_with_transformers_or_name_the_missing_packages(mpirun, name, flags, agrees):
    outcome = mpirun(2, *python("-m", "moempi", "bench", name, *flags, "--rounds", "1"), COLUMNS="200")
    if find_spec("torch") is None:
        assert (outcome.code, len(outcome.lines)) == (64, 1)
        assert "needs torch and transformers" in outcome.lines[0]
    else:
        assert outcome.code == 0, outcome.err
        assert agrees(next(line for line in outcome.out.splitlines() if "float32" in line).split()[-1])
