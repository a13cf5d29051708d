"""`moempi completion`: what bash offers for a word."""

import subprocess

import pytest

from moempi.cli import COMMANDS, main


@pytest.fixture
def complete(capsys):
    assert main(["completion"]) == 0
    script = capsys.readouterr().out

    def complete(*words: str) -> list[str]:
        program = f"""{script}
            COMP_WORDS=(moempi "$@") COMP_CWORD=$#
            _moempi
            printf '%s\\n' "${{COMPREPLY[@]}}"
        """
        bash = ["bash", "-euo", "pipefail", "-c", program, "bash", *words]
        return subprocess.run(bash, capture_output=True, text=True, check=True).stdout.split()

    return complete


def test_commands(complete):
    assert complete("") == list(COMMANDS)
    assert complete("co") == ["convert", "compare", "completion"]


def test_options_of_a_command_also_on_ranks(complete):
    for words in (["run"], ["launch", "-n", "4", "run"]):
        assert complete(*words, "job.toml", "--d") == ["--debug", "--dry-run"]
    assert complete("show", "job.toml", "--f") == ["--first"]
    assert complete("show", "job") == []  # then bash offers files


def test_keys_of_a_job(complete):
    assert complete("run", "job.toml", "--set", "sampling.top") == [
        "sampling.top_k=",
        "sampling.top_p=",
        "sampling.top_logprobs=",
    ]
    assert complete("run", "job.toml", "--set", "ta") == ["task="]
