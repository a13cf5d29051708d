"""`moempi plan --explain` without a search: each figure is what its formula gives."""

import re

import pytest

from moempi.cli import main
from mpirun import ROOT

NUMBER = r"([\d.,]+)"
QUOTIENTS = {
    rf"token/s {NUMBER} = {NUMBER} tokens of a micro-batch / {NUMBER} ms": 1000,
    rf"a rank {NUMBER} = {NUMBER} token/s / {NUMBER} ranks": 1,
    rf"{NUMBER} tokens = {NUMBER} sequences / {NUMBER} micro-batches": 1,
    rf"of ideal {NUMBER}% = {NUMBER} ms, mean compute of all ranks / {NUMBER} ms": 100,
    rf"gain {NUMBER} = {NUMBER} ms if ranks wait for rows / {NUMBER} ms": 1,
    rf"arithmetic {NUMBER} ms = {NUMBER} GFLOP / {NUMBER} TFLOP/s": 1,
    rf"memory {NUMBER} ms = {NUMBER} MB / {NUMBER} GB/s": 1,
}
PRODUCTS = (
    rf"ms a token {NUMBER} = {NUMBER} micro-batches in flight x {NUMBER} ms",
    rf"first s {NUMBER} = {NUMBER} steps of a prompt x {NUMBER} s",
)


@pytest.fixture(scope="module")
def explained():
    """The lines that explain the mission's job."""
    sizes = ("--ranks", "3904", "--ranks-per-node", "8")
    machine = ROOT / "jobs/machines/mission-h100.toml"
    with pytest.MonkeyPatch.context() as patch:
        lines = []
        patch.setattr(
            "moempi.commands.plan.console", lambda: type("", (), {"print": lambda *each, sep: lines.extend(each)})
        )
        assert main(["plan", str(ROOT / "jobs/mission.toml"), "--machine", str(machine), *sizes, "--explain"]) == 0
    return "\n".join(line for line in lines if isinstance(line, str))


def numbers_of(pattern, text):
    found = [[float(number.rstrip(".,").replace(",", "")) for number in each] for each in re.findall(pattern, text)]
    assert found
    return found


@pytest.mark.parametrize("pattern", QUOTIENTS)
def test_quotients_hold(explained, pattern):
    for figure, dividend, divisor in numbers_of(pattern, explained):
        assert figure == pytest.approx(QUOTIENTS[pattern] * dividend / divisor, rel=0.02)


@pytest.mark.parametrize("pattern", PRODUCTS)
def test_products_hold(explained, pattern):
    for figure, one, other in numbers_of(pattern, explained):
        assert figure == pytest.approx(one * other, rel=0.02)


def test_the_slowest_stage_and_steps_that_are_simulated_are_named(explained):
    assert "stage 60, the slowest: " in explained
    assert "micro-batches do not fill 61 x 2 lanes: simulated" in explained
