"""`moempi show`: the first outputs of a finished job beside their prompts."""

from argparse import ArgumentParser, Namespace
from itertools import islice

from moempi.commands.flags import MAX_COUNT, add_job_flags, read_job, whole_number
from moempi.errors import DataError
from moempi.observe.run_report import OutputRow, print_outputs
from moempi.storage.prompts import read_prompts
from moempi.storage.results import ResultFile


def add_flags(parser: ArgumentParser) -> None:
    """The job, and the number of outputs."""
    add_job_flags(parser)
    parser.add_argument(
        "--first", type=whole_number(0, MAX_COUNT), default=10, metavar="N", help="number of outputs (10)"
    )


def run(chosen: Namespace) -> int:
    """Print a table with one row a request."""
    job = read_job(chosen)
    prompts = read_prompts(job.input.prompts, sampling=job.sampling, strict=False)
    with ResultFile(job.output.results) as results:
        if len(prompts) != results.num_requests:
            counts = f"{results.num_requests} requests for the {len(prompts)} of {job.input.prompts}"
            raise DataError(f"{job.output.results}: holds {counts}; show the prompts of the run that wrote it")
        pairs = islice(zip(prompts, results.requests(), strict=True), chosen.first)
        print_outputs([OutputRow(prompt.text or prompt.id, record.text, record.reference) for prompt, record in pairs])
    return 0
