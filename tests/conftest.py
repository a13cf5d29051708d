"""Tests that run on ranks: `@pytest.mark.ranks(1, 3)` on a test that takes `comm` runs its body on every rank of worlds
of 1 and of 3. All such tests of a file share one mpirun for each number of ranks. `mpirun(n, *command)` runs a program;
`runner(n).run(*words)` runs the program in ranks that all tests of a file share.
"""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import settings

import mpirun as launching
from runner import Runner

settings.register_profile("loaded machine", deadline=None)
settings.load_profile("loaded machine")

# Set inside such a world: the folder where each rank writes what became of its tests.
WORLD_VARIABLE = "MOEMPI_TEST_WORLD"
WORLD_LIMIT_S = 600.0

# (rank, outcome, text) of each test by its node id; beside it, how the world ended.
World = tuple[dict[str, list[tuple[int, str, str]]], str]
WORLDS = pytest.StashKey[dict[tuple[Path, int], World]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--claims", type=Path, metavar="FOLDER", help="leave out the files of tests claimed in FOLDER")


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> bool | None:
    """With `--claims FOLDER`, share the files of tests with all other processes that were given the same folder."""
    folder = session.config.getoption("--claims")
    if folder is None or session.config.option.collectonly or session.testsfailed:
        return None
    mine = claimed(session.items, folder)
    item = next(mine, None)
    while item is not None and not session.shouldfail and not session.shouldstop:
        following = next(mine, None)
        item.ihook.pytest_runtest_protocol(item=item, nextitem=following)
        item = following
    if session.shouldfail:
        raise session.Failed(session.shouldfail)
    if session.shouldstop:
        raise session.Interrupted(session.shouldstop)
    return True


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Leave a mark in the folder of claims, which a process that a test ended does not."""
    if (folder := session.config.getoption("--claims")) is not None:
        (folder / f"{os.getpid()}.ended").touch()


def claimed(items: list[pytest.Item], folder: Path) -> Iterator[pytest.Item]:
    """The tests of the files that no other process has claimed; a file is claimed when the test before it is due.

    A file's tests that start mpirun and its others are claimed apart, and all that start mpirun come first: a process
    that has started MPI itself keeps variables of it.
    """
    mine: dict[tuple[str, str], bool] = {}
    for item in sorted(items, key=kind):
        part = kind(item), str(item.path.relative_to(item.config.rootpath)).replace(os.sep, "%")
        if part not in mine:
            mine[part] = claim(folder / "%".join(part))
        if mine[part]:
            yield item


def kind(item: pytest.Item) -> str:
    """The kinds of tests in the order in which they run."""
    return "mpi" if item.get_closest_marker("mpi") else "other"


def claim(place: Path) -> bool:
    try:
        place.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


@pytest.fixture
def mpirun():
    """`mpirun(n, *command, limit_s=300, NAME=value)` runs a command on n ranks; a limit passed is a failure."""
    return launching.mpirun


@pytest.fixture(scope="module")
def runner(tmp_path_factory) -> Iterator[Callable[..., Runner]]:
    """`runner(n).run(*words)` runs a command line of the program on n ranks, which then run the next tests.

    `runner(n, module="simt.run", NAME=value)` runs the `main` of a module of the tests, with environment variables. It
    is for tests of what a run computes, not of how it starts and ends.
    """
    runners: dict[tuple[object, ...], Runner] = {}
    ends = ExitStack()

    def runner(num_ranks: int, *, module: str = "moempi.cli", **environment: str) -> Runner:
        key = (num_ranks, module, *environment.items())
        if key not in runners:
            folder = tmp_path_factory.mktemp(f"runner-{num_ranks}")
            runners[key] = Runner(num_ranks, folder, module=module, **environment)
            ends.callback(runners[key].end)
        return runners[key]

    with ends:
        yield runner


@pytest.fixture
def comm():
    """A communicator of all ranks of the test's world; those that come early sleep, as they do behind the test."""
    from mpi4py import MPI

    from moempi.runtime.waiting import barrier

    barrier(MPI.COMM_WORLD)
    duplicate = MPI.COMM_WORLD.Dup()
    yield duplicate
    barrier(duplicate)
    duplicate.Free()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    marker = metafunc.definition.get_closest_marker("ranks")
    if marker is not None:
        metafunc.fixturenames.append("num_ranks")
        metafunc.parametrize("num_ranks", marker.args, scope="module", ids=lambda num: f"{num}ranks")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("ranks") or {"mpirun", "runner"}.intersection(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.mpi)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> None:
    """Outside a world, a rank-wise test needs none of its fixtures: they are made on the ranks."""
    if item.get_closest_marker("ranks") and WORLD_VARIABLE not in os.environ:
        item.fixturenames[:] = []


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    if pyfuncitem.get_closest_marker("ranks") is None or WORLD_VARIABLE in os.environ:
        return None
    judge(pyfuncitem)
    return True


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Iterator[None]:
    report = yield
    folder = os.environ.get(WORLD_VARIABLE)
    if folder and (call.when == "call" or not report.passed):
        note(Path(folder), item.nodeid, report)
    return report


def note(folder: Path, nodeid: str, report: pytest.TestReport) -> None:
    """Write what became of a test on this rank; after a failure the other ranks would wait for ever, so end them."""
    from mpi4py import MPI

    place = folder / f"{MPI.COMM_WORLD.rank}.jsonl"
    with place.open("a") as file:
        file.write(json.dumps({"test": nodeid, "outcome": report.outcome, "text": report.longreprtext}) + "\n")
    if report.failed:
        MPI.COMM_WORLD.Abort(1)


def judge(item: pytest.Function) -> None:
    """Pass, skip or fail as the ranks did."""
    num_ranks = item.callspec.params["num_ranks"]
    outcomes, ending = world_of(item, num_ranks)
    found = outcomes.get(item.nodeid, [])
    for rank, outcome, text in found:
        if outcome == "failed":
            pytest.fail(f"rank {rank} of {num_ranks}:\n{text}", pytrace=False)
    if len(found) < num_ranks:
        pytest.fail(f"ran on {len(found)} of {num_ranks} ranks: another test ended the world\n{ending}", pytrace=False)
    if all(outcome == "skipped" for _, outcome, _ in found):
        pytest.skip(found[0][2])


def world_of(item: pytest.Function, num_ranks: int) -> World:
    """Run all selected rank-wise tests of the item's file at once, the first time that one of them is due."""
    worlds = item.config.stash.setdefault(WORLDS, {})
    key = (item.path, num_ranks)
    if key not in worlds:
        names = [
            other.nodeid
            for other in item.session.items
            if other.path == item.path and other.get_closest_marker("ranks") and params_of(other) == num_ranks
        ]
        worlds[key] = run_world(item.config, names, num_ranks)
    return worlds[key]


def params_of(item: pytest.Item) -> int:
    return item.callspec.params["num_ranks"]


def run_world(config: pytest.Config, names: list[str], num_ranks: int) -> World:
    folder = config._tmp_path_factory.mktemp("world")
    command = launching.python("-m", "pytest", "-q", "-p", "no:cacheprovider", *names)
    try:
        outcome = launching.mpirun(num_ranks, *command, limit_s=WORLD_LIMIT_S, **{WORLD_VARIABLE: str(folder)})
        ending = outcome.out[-4000:] + outcome.err[-4000:]
    except AssertionError as error:
        ending = str(error)[-4000:]
    outcomes: dict[str, list[tuple[int, str, str]]] = {}
    for place in sorted(folder.glob("*.jsonl")):
        for line in place.read_text().splitlines():
            entry = json.loads(line)
            outcomes.setdefault(entry["test"], []).append((int(place.stem), entry["outcome"], entry["text"]))
    return outcomes, ending
