"""Inputs of every class end as they must; `python tests/fuzz/fuzz.py` runs any number of them."""

import pytest

from fuzz.campaign import fuzz, fuzz_commands
from fuzz.seeds import seeded_folder
from fuzz.subjects import SUBJECTS

INPUTS, COMMANDS, SEED = 2000, 4, 1


@pytest.fixture(scope="module")
def folder():
    with seeded_folder() as folder:
        yield folder


@pytest.mark.parametrize("name", SUBJECTS)
def test_every_input_is_accepted_or_refused_in_one_message(name, folder):
    score = fuzz(SUBJECTS[name](folder / "seeds"), range(INPUTS), seed=SEED, folder=folder)
    print(score.row())
    assert [(ending.index, ending.finding) for ending in score.findings] == []
    assert score.inputs == INPUTS
    assert 0.1 <= score.share <= 0.9, "the inputs do not reach what is behind the first check, or are hardly damaged"


@pytest.mark.parametrize("name", [name for name, subject in SUBJECTS.items() if subject.commands])
def test_the_program_ends_with_a_documented_code_and_one_line(name, folder):
    score = fuzz_commands(SUBJECTS[name](folder / "seeds"), range(COMMANDS), seed=SEED, folder=folder)
    assert [(ending.index, ending.finding) for ending in score.findings] == []
