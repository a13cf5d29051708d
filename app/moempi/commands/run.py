"""`moempi run`: a job on all ranks, or with --dry-run the layout and memory that it would have."""

import gc
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path
from textwrap import indent

from moempi.commands.flags import MAX_COUNT, MAX_RANKS, add_force_flag, add_job_flags, amount, read_job, whole_number
from moempi.config.job import Job, TopologySection
from moempi.config.reading import given_keys
from moempi.runtime.monitor import Monitor
from moempi.runtime.shm_segments import choose_segment_folder
from moempi.runtime.stop import Stop


def add_flags(parser: ArgumentParser) -> None:
    """The job, its limits, and the dry run."""
    add_job_flags(parser)
    parser.add_argument("--dry-run", action="store_true", help="print layout and memory, read no weights")
    ranks = whole_number(0, MAX_RANKS)
    parser.add_argument("--world", type=ranks, default=0, metavar="N", help="dry run as if on N ranks, without MPI")
    parser.add_argument("--ranks-per-node", type=ranks, default=0, metavar="N", help="dry run: ranks on a node")
    context = "dry run: tokens of a sequence (2048, or all positions of the model)"
    parser.add_argument("--context", type=whole_number(0, MAX_COUNT), default=0, metavar="N", help=context)
    machine = "dry run: also forecast tokens/s, as moempi plan does"
    parser.add_argument("--machine", type=Path, metavar="MACHINE.toml", help=machine)
    parser.add_argument("--max-minutes", type=amount, metavar="N", help="end early after N minutes, with exit code 75")
    parser.add_argument(
        "--strict", action="store_true", help="stop at the first bad prompt line instead of recording it"
    )
    parser.add_argument(
        "--max-errors",
        type=whole_number(0, MAX_COUNT),
        metavar="N",
        help="exit code 65 if more than N requests end with an error; without it, if all do",
    )
    add_force_flag(parser)


def run(chosen: Namespace) -> int:
    """Run the job; collective, unless --world makes it a dry run without MPI."""
    if chosen.world:
        ranks_per_node = chosen.ranks_per_node or chosen.world
        return _show_layout(chosen, read_job(chosen), [rank // ranks_per_node for rank in range(chosen.world)])
    choose_segment_folder()
    monitor = Monitor()
    monitor.fork()
    stop = Stop(max_minutes=chosen.max_minutes)
    stop.catch_signals()  # before MPI, whose start takes time
    from moempi.engine.run import run_job
    from moempi.runtime.world import World

    gc.freeze()  # what is imported stays until the end: neither collections nor the interpreter's end traverse it
    world = World.start(monitor, debug=chosen.debug)
    with world.guard(accept=stop.accept):
        if chosen.dry_run:
            job = world.collectively(lambda: read_job(chosen))
            given = TopologySection(ranks_per_node=chosen.ranks_per_node)
            topology, _ = world.by_node(given if chosen.ranks_per_node else job.topology)
            return world.collectively(lambda: _show_layout(chosen, job, topology.nodes) if world.rank == 0 else 0)
        return run_job(
            lambda: _read(chosen, is_first=world.rank == 0),
            job_text=_job_text(chosen) if world.rank == 0 else "",
            world=world,
            stop=stop,
            strict=chosen.strict,
            max_errors=chosen.max_errors,
            on_finished=world.finish,
        )


def _read(chosen: Namespace, *, is_first: bool) -> Job:
    """The job with what its weight file recommends; the first rank also checks its outputs, and copies stdin."""
    from moempi.engine.sampling_defaults import with_sampling_defaults
    from moempi.storage.stdin import with_stdin

    job = read_job(chosen)
    if is_first:
        _check_outputs(chosen, job)
    job = with_sampling_defaults(job, given=given_keys(chosen.job, "sampling", overrides=chosen.set))
    return with_stdin(job, is_reader=is_first)


def _job_text(chosen: Namespace) -> str:
    """The job file, with the overrides as comments, also the second line of one; "" if reading the job will fail."""
    overrides = "".join(f"--set {override}\n" for override in chosen.set)
    try:
        return Path(chosen.job).read_text(encoding="utf-8") + indent(overrides, "# ", lambda _: True)
    except (OSError, ValueError):
        return ""


def _check_outputs(chosen: Namespace, job: Job) -> None:
    """Raise StorageError if a file that the run writes is one of its inputs, or cannot be written.

    Makes the folder of the results.
    """
    from moempi.config.job import input_files
    from moempi.errors import StorageError
    from moempi.observe.logs import logs_folder
    from moempi.storage.files import check_output, refuse_same_file
    from moempi.storage.journal import journals_folder
    from moempi.storage.results import is_results_file
    from moempi.storage.run_state import state_path

    inputs = [chosen.job, *input_files(job)]
    results = Path(job.output.results)
    try:
        results.parent.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", error)
        raise StorageError(f"{str(results)!r}: its folder cannot be made: {reason}") from error
    check_output(results, inputs=inputs, replaceable=is_results_file, force=chosen.force)
    check_output(state_path(results), inputs=inputs, replaceable=lambda _: True)
    for folder in (journals_folder(results), logs_folder(results)):
        for path in folder.rglob("*"):
            refuse_same_file(path, inputs)


def _show_layout(chosen: Namespace, job: Job, nodes: Sequence[int]) -> int:
    """Print the dry run on ranks whose node is nodes[rank]; the exit status."""
    from moempi.commands.dry_run import dry_run
    from moempi.commands.plan import forecast_job
    from moempi.config.machine_file import read_machine
    from moempi.errors import ConfigError
    from moempi.layout.topology import Topology
    from moempi.observe.run_report import print_layout
    from moempi.printing import print_line

    layout = dry_run(job, nodes, context=chosen.context)
    print_layout(layout)
    if chosen.machine:
        machine = read_machine(chosen.machine)
        forecasts = forecast_job(job, machine, Topology(tuple(nodes)), context=layout.context, prompt=layout.context)
        for found in forecasts:
            tokens_per_s = found.tokens_per_s(overlap=True)
            print_line(f"{found.workload.name}: about {tokens_per_s:,.0f} tokens/s, a forecast for {machine.name}")
    return ConfigError.exit_code if layout.refused else 0
