"""`moempi plan`: the speed of a job, forecast on a machine that a file describes."""

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from moempi.commands.dry_run import architecture_of
from moempi.commands.flags import MAX_RANKS, add_job_flags, count, read_job, whole_number
from moempi.commands.plan_explain import formulas
from moempi.commands.plan_report import pictures_of, write_report
from moempi.commands.plan_search import add_search_flags, require_search_flags, run_search, workload_of
from moempi.commands.plan_virtual import add_virtual_flags, is_requested, require_virtual_flags, virtual_table
from moempi.config.job import Job, input_files
from moempi.config.machine_file import MachineFile, read_machine
from moempi.config.placement_file import read_job_placement
from moempi.errors import UsageError
from moempi.layout.layout import make_layout
from moempi.layout.topology import Topology, virtual
from moempi.observe.console import console, figures_table, numbered_runs
from moempi.planning.candidates import SearchRequest
from moempi.planning.forecast import Forecast, PlannedJob, forecast
from moempi.planning.workload import decode, prefill, score
from moempi.printing import print_line
from moempi.storage.files import check_output


def add_flags(parser: ArgumentParser) -> None:
    """The job, the machine, its ranks, the lengths of sequences, and the search."""
    add_job_flags(parser)
    machine = "speeds of a rank and of the links"
    parser.add_argument("--machine", type=Path, required=True, metavar="MACHINE.toml", help=machine)
    parser.add_argument("--ranks", type=whole_number(1, MAX_RANKS), required=True, metavar="N", help="number of ranks")
    parser.add_argument("--ranks-per-node", type=count, default=0, metavar="N", help="ranks on a node (all)")
    parser.add_argument("--context", type=count, default=2048, metavar="N", help="decode: tokens in the cache (2048)")
    parser.add_argument("--prompt", type=count, default=4096, metavar="N", help="prefill: tokens of a prompt (4096)")
    explain = "show what each figure is computed from; with --search, what the best layouts wait for"
    parser.add_argument("--explain", action="store_true", help=explain)
    report = "write pictures of the forecast, an HTML file"
    parser.add_argument("--report", type=Path, metavar="PLAN.html", help=report)
    add_virtual_flags(parser)
    add_search_flags(parser)


def run(chosen: Namespace) -> int:
    """Print the forecast of every stage and of the whole job, or with --search the best layouts."""
    require_search_flags(chosen)
    require_virtual_flags(chosen)
    job, machine = read_job(chosen), read_machine(chosen.machine)
    if chosen.report:
        if chosen.out and chosen.out.absolute() == chosen.report.absolute():
            raise UsageError(f"--report and -o name the same file, {chosen.out}")
        inputs = [chosen.job, chosen.machine, *input_files(job)]
        check_output(chosen.report, inputs=inputs, force=chosen.force)
    topology = virtual(chosen.ranks, chosen.ranks_per_node or chosen.ranks)
    if chosen.search:
        return run_search(chosen, SearchRequest(job, architecture_of(job), machine, topology, workload_of(chosen, job)))
    planned = planned_job(job, machine, topology)
    forecasts = forecasts_of(planned, context=chosen.context, prompt=chosen.prompt)
    tables = [_stage_table(forecasts), _total_table(forecasts)]
    if is_requested(chosen):
        tables.append(virtual_table(chosen, planned, forecasts))
    lines = [line for found in forecasts for line in formulas(found, machine)] if chosen.explain else []
    console().print(*tables, *lines, f"A model's forecast, not a measurement, of: {machine.name}", sep="\n")
    if chosen.report:
        write_report(chosen.report, planned, [one for found in forecasts for one in pictures_of(planned, found)])
        print_line(f"wrote {chosen.report}")
    return 0


def planned_job(job: Job, machine: MachineFile, topology: Topology) -> PlannedJob:
    """The job laid out on these ranks; raises the MoempiErrors that the run would raise for its layout."""
    architecture = architecture_of(job)
    on_gpu = job.run.backend == "cupy"
    layout = make_layout(job, architecture, topology.nodes, placement=read_job_placement(job), on_gpu=on_gpu)
    return PlannedJob(job, architecture, layout, machine, topology)


def forecasts_of(planned: PlannedJob, *, context: int, prompt: int) -> Sequence[Forecast]:
    """Forecasts of prefill with prompts of `prompt` tokens, and of decode with `context` tokens in the cache.

    Decode is left out if the job generates nothing. Raises ConfigError if the caches do not fit.
    """
    workloads = [prefill(prompt), decode(context)] if planned.job.task == "generate" else [score(prompt)]
    return [forecast(planned, workload) for workload in workloads]


def forecast_job(
    job: Job, machine: MachineFile, topology: Topology, *, context: int, prompt: int
) -> Sequence[Forecast]:
    """`forecasts_of` the job on these ranks."""
    return forecasts_of(planned_job(job, machine, topology), context=context, prompt=prompt)


def _stage_table(forecasts: Sequence[Forecast]) -> Table:
    """One row for all adjacent stages with the same forecast."""
    table = figures_table("step", "stages", "ranks", "compute", "travel", "waiting", "overlapped", "limit")
    table.caption = "ms: compute of a step, travel of its rows; from step to step of a stage: waiting, overlapped"
    for found in forecasts:
        for name, stage in numbered_runs(found.stages):
            spans = (stage.compute_s, stage.travel_s, stage.waiting_s, stage.overlapped_s)
            table.add_row(
                found.workload.name, name, f"{stage.ranks}", *(f"{span * 1e3:.3f}" for span in spans), stage.limit
            )
    return table


def _total_table(forecasts: Sequence[Forecast]) -> Table:
    """The speed of the whole job with overlap, and its share of the speed without any wait."""
    table = figures_table("step", "token/s", "a rank", "of ideal", "gain", "sequences", "ms a token", "first s")
    table.caption = "ideal: the same steps without travel and idle ranks; gain: of overlap"
    for found in forecasts:
        overlapped, waiting = (found.tokens_per_s(overlap=overlap) for overlap in (True, False))
        generates = found.workload.output > 0
        table.add_row(
            found.workload.name,
            f"{overlapped:,.0f}",
            f"{overlapped / found.num_ranks:,.1f}",
            f"{found.ideal_s / found.micro_batch_s(overlap=True):.1%}",
            f"{overlapped / waiting:.2f}",
            f"{found.sequences:,.0f}",
            f"{found.seconds(overlap=True) * 1e3:.1f}" if generates else "",
            f"{found.first_token_s:.2f}" if found.workload.prompt else "",
        )
    return table
