"""What the tests between virtual hosts share: weights and prompts for all hosts, and a table of the failures."""

from collections import Counter
from pathlib import Path

import pytest

from cluster import hosts
from cluster.jobs import write_prompts
from faults.campaign import table


@pytest.fixture(scope="session")
def net(tmp_path_factory) -> dict[str, object]:
    """Settings of a job that its links limit: 8 of 32 experts, rows of 2 KB."""
    folder: Path = tmp_path_factory.mktemp("net")
    hosts.run("moempi", "init", hosts.HERE / "arch.toml", folder / "net.h5", "--seed", "1")
    write_prompts(folder / "net.jsonl", num=32, tokens=120, vocabulary=512)
    return {
        "model__weights": folder / "net.h5",
        "input__prompts": folder / "net.jsonl",
        "run__max_sequences": 8,
        "run__timeout_s": 60,
        "sampling__max_tokens": 2,
        "sampling__ignore_eos": "true",
        "exchange__transport": "pairwise",
    }


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print how often each failure was tried, and how often the test passed, as tests/faults/campaign.py does."""
    tried: Counter[str] = Counter()
    passed: Counter[str] = Counter()
    for outcome in ("passed", "failed"):
        for report in terminalreporter.getreports(outcome):
            name = dict(report.user_properties).get("failure")
            if name is not None and report.when == "call":
                tried[str(name)] += 1
                passed[str(name)] += outcome == "passed"
    if tried:
        terminalreporter.write_line(table(tried, passed))
