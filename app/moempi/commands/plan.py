"""`moempi plan`: a job on a machine that need not be there, from its files to the forecasts."""

from collections.abc import Iterator, Mapping
from itertools import groupby

from moempi.commands.dry_run import architecture_of
from moempi.config.job import Job
from moempi.config.machine_file import MachineFile
from moempi.config.placement_file import read_job_placement
from moempi.layout.layout import make_layout
from moempi.layout.topology import Topology
from moempi.observe.forecast_table import StageLine, TotalLine, print_forecast
from moempi.planning.forecast import Deployment, Forecast, forecast


def forecast_job(
    job: Job, machine: MachineFile, topology: Topology, *, context: int, prompt: int
) -> Mapping[str, Forecast]:
    """Forecasts of reading prompts of `prompt` tokens and of generating with `context` tokens in the cache.

    Raises the MoempiErrors that the run itself would raise for its layout. Not collective.
    """
    architecture = architecture_of(job)
    plan = make_layout(
        job, architecture, topology.nodes, placement=read_job_placement(job), on_gpu=job.run.backend == "cupy"
    )
    scene = Deployment(job, architecture, plan, machine, topology)
    # Prefill: every step is full of prompts' rows, which see half of their prompt on average.
    rows = job.run.batch_tokens
    forecasts = {"prefill": forecast(scene, rows=rows, sequences=max(1.0, rows / prompt), context=prompt / 2)}
    # Decode: every slot generates.
    if job.task == "generate":
        rows_of_lane = plan.grid.slots_per_group / job.lanes
        forecasts["decode"] = forecast(scene, rows=rows_of_lane, sequences=rows_of_lane, context=context)
    return forecasts


def print_what_if(forecasts: Mapping[str, Forecast], *, machine: str) -> None:
    """Print them on stdout."""
    stages = [line for kind, found in forecasts.items() for line in _lines(kind, found)]
    print_forecast(stages, [_total(kind, found) for kind, found in forecasts.items()], machine=machine)


def _total(kind: str, found: Forecast) -> TotalLine:
    waiting, overlapped = (found.tokens_per_s(overlap=overlap) for overlap in (False, True))
    return TotalLine(kind, waiting, overlapped, token_s=found.seconds(overlap=True))


def _lines(kind: str, found: Forecast) -> Iterator[StageLine]:
    """One for all neighbouring stages that are alike."""
    first = 0
    for stage, alike in groupby(found.stages):
        last = first + len(list(alike)) - 1
        yield StageLine(kind, first, last, stage.compute_s, stage.travel_s, stage.waiting_s, stage.overlapped_s)
        first = last + 1
