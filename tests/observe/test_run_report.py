"""The figures of the report, and the tables of layouts and outputs."""

import io

import numpy as np
import pytest

from moempi.observe.console import PlainConsole
from moempi.observe.run_report import (
    LayoutTable,
    OutputRow,
    Report,
    StageRow,
    imbalance,
    outputs_table,
    phase_shares,
    print_layout,
    report_table,
    stragglers,
)


def text_of(renderable) -> str:
    screen = io.StringIO()
    PlainConsole(file=screen, width=140).print(renderable)
    return screen.getvalue()


def test_imbalance_is_busiest_over_mean():
    loads = np.array([[10, 10, 10, 10], [40, 0, 0, 0], [0, 0, 0, 0]])
    assert imbalance(loads).tolist() == [1.0, 4.0, 1.0]


def test_shares_are_of_each_ranks_own_time():
    shares = phase_shares({"compute": [3.0, 1.0], "exchange": [1.0, 1.0], "idle": [0.0, 2.0]})
    assert [(name, low, high) for name, low, _, high in shares] == [
        ("compute", 0.25, 0.75),
        ("exchange", 0.25, 0.25),
        ("idle", 0.0, 0.5),
    ]
    assert shares[0][2] == pytest.approx(0.5)


def test_shares_of_a_run_without_time():
    assert phase_shares({"compute": [0.0]}) == [("compute", 0.0, 0.0, 0.0)]
    assert phase_shares({}) == []


def test_the_report_holds_every_figure():
    report = Report(
        results="results/[bold]a.h5",
        tokens=1000,
        wall_s=2.0,
        seconds={"compute": [1.5, 1.0], "exchange": [0.5, 1.0]},
        expert_load=np.array([[10, 30], [20, 20]]),
        finishes={"stop": 250, "length": 6},
        exact=255,
        referenced=256,
    )
    text = text_of(report_table(report))
    for figure in (
        "500.0",
        "62.5%",
        "from 50.0% to 75.0%",
        "1.25  (worst layer 1.50)",
        "length 6, stop 250",
        "255 of 256  (99.6%)",
        "results/[bold]a.h5",
    ):
        assert figure in text


def test_the_slowest_ranks_of_each_phase():
    disk = [0.001, 0.002, 0.003, 0.004]
    assert stragglers({"compute": [1.0, 4.0, 2.0, 3.0], "idle": [0.0, 0.0, 0.5, 0.0], "disk": disk}) == {
        "compute": [1, 3, 2],
        "idle": [2, 0, 1],
    }
    assert stragglers({"compute": [1.0]}) == {}


def test_the_report_names_hosts_and_earlier_runs():
    report = Report(
        "a.h5",
        10,
        1.0,
        {"compute": [1.0, 4.0]},
        np.zeros((0, 0), np.int64),
        {"stop": 9},
        hosts=["n1", "n2"],
        earlier_requests=6,
        earlier_tokens=1234,
    )
    text = text_of(report_table(report))
    assert "1 on n2 (4.00 s), 0 on n1 (1.00 s)" in text
    assert "6 requests, 1,234 tokens" in text
    assert report.num_finished == 9


def test_a_report_of_nothing():
    report = Report("a.h5", 0, 0.0, {"compute": [0.0]}, np.zeros((0, 0), np.int64), {})
    assert "exact" not in text_of(report_table(report))


def make_stage(**fields):
    counts = {"layers": 1, "ranks": 64, "nodes": 8, "groups": 64, "experts": "1"}
    return StageRow(**(counts | {"memory": {"weights": 1 << 30}, "sequences": 5, "total": 3 << 30} | fields))


def test_the_layout_joins_stages_that_are_alike(capsys):
    first = make_stage(layers=3, experts="0", memory={"weights": 1 << 20})
    print_layout(LayoutTable("mission", [first, make_stage(), make_stage()], context=2048))
    text = capsys.readouterr().out
    for words in ("mission", "1.00 MiB", "1.00 GiB", "1 to 2", "3.00 GiB", "2,048 tokens"):
        assert words in text


def test_the_layout_of_large_numbers_fits_80_columns_with_its_units(capsys):
    memory = dict.fromkeys(("weights", "rows", "a cached token"), 1023 << 20)
    row = make_stage(layers=999, ranks=100_000, nodes=10_000, groups=100_000, experts="10 to 11", memory=memory)
    print_layout(LayoutTable("mission", [make_stage(), *[row] * 999], context=131_072))
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    assert text.count("1023.00 MiB") == 3
    assert "…" not in text


def test_a_refusal_is_one_line_below_the_layout(capsys):
    print_layout(LayoutTable("mission", [], context=1, refused=["stage 0:\n" + "no memory " * 20]))
    assert capsys.readouterr().out.splitlines()[-1] == "refused: stage 0: " + " ".join(["no memory"] * 20)


def test_outputs_say_whether_they_equal_the_reference():
    outputs = [OutputRow("12+[red]30=", "42\x1b[2J", "42"), OutputRow("a", "b", "b"), OutputRow("c", "d", None)]
    text = text_of(outputs_table(outputs))
    assert "12+[red]30=" in text
    assert "42\\x1b[2J" in text
    assert text.count("exact") == 1
    assert text.count("differs") == 1
