"""`moempi show`: the first outputs of a finished job beside their prompts."""

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from itertools import islice
from tempfile import gettempdir

from moempi.commands.flags import MAX_COUNT, add_job_flags, read_job, whole_number
from moempi.config.job import Job
from moempi.config.reading import STDIN
from moempi.errors import DataError
from moempi.observe.run_report import OutputRow, ScoreRow, print_outputs, print_scores
from moempi.printing import print_line
from moempi.storage.prompt_file import read_prompts
from moempi.storage.prompts import Prompt
from moempi.storage.records import Scores
from moempi.storage.results import ResultFile


def add_flags(parser: ArgumentParser) -> None:
    """The job, and the number of outputs."""
    add_job_flags(parser)
    parser.add_argument(
        "--first", type=whole_number(0, MAX_COUNT), default=10, metavar="N", help="number of outputs (10)"
    )


def run(chosen: Namespace) -> int:
    """Print a table with one row a request, and the number of errors if there are any."""
    job = read_job(chosen)
    with ResultFile(job.output.results) as results:
        records = list(islice(results.requests(), chosen.first))
        texts = [prompt.text or prompt.id for prompt in _prompts(job, results, len(records))]
        texts = texts or [record.id for record in records]
        pairs = list(zip(texts, records, strict=True))
        if job.task == "score":
            print_scores([ScoreRow(text, Scores.of(record.score), record.error) for text, record in pairs])
        else:
            print_outputs([OutputRow(text, record.text, record.reference, record.error) for text, record in pairs])
        if errors := results.num_errors():
            print_line(f"{errors} of {results.num_requests} requests ended with an error")
    return 0


def _prompts(job: Job, results: ResultFile, first: int) -> Sequence[Prompt]:
    """The `first` prompts of the results; none if they came from stdin."""
    if job.input.prompts == STDIN:
        return []
    spool, counts = read_prompts(
        job.input.prompts, sampling=job.sampling, strict=False, folder=gettempdir(), column=job.input.column
    )
    with spool:
        if counts.requests != results.num_requests:
            found = f"{results.num_requests} requests for the {counts.requests} of {job.input.prompts}"
            raise DataError(f"{job.output.results}: holds {found}; show the prompts of the run that wrote it")
        return list(islice(spool, first))
