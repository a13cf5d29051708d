"""The commands. Each imports what it needs: `moempi --help` is instant, and only what runs on ranks starts MPI."""

import argparse
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

from moempi import __version__
from moempi.errors import MoempiError, UsageError
from moempi.runtime.launcher import GRACE_S, launched_first
from moempi.runtime.monitor import WITNESS

MOST_REPLICAS = 8.0
BENCHMARKS = ("layer", "generate", "exchange", "overlap", "immediate", "placement", "plan", "gpu")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status (sysexits.h); prints one line on stderr when it fails."""
    chosen = _parser().parse_args(arguments)
    command: Callable[[argparse.Namespace], int] = chosen.command
    try:
        return command(chosen)
    except MoempiError as error:
        return _fail(str(error), error.exit_code, debug=chosen.debug, once=isinstance(error, UsageError))
    except KeyboardInterrupt:
        return _fail("interrupted", 130, debug=chosen.debug)
    except Exception as error:
        return _fail(f"{type(error).__name__}: {error}", MoempiError.exit_code, debug=chosen.debug)


def run(chosen: argparse.Namespace) -> int:
    """Run a job on all ranks."""
    WITNESS.fork()
    from moempi.runtime.stop import Stop

    stop = Stop(max_minutes=chosen.max_minutes)  # before MPI, which takes a while to start
    from moempi.config.job import Job, TopologySection
    from moempi.config.reading import read_toml
    from moempi.engine.run import run_job
    from moempi.runtime.world import World

    if chosen.world:
        ranks_per_node = chosen.ranks_per_node or chosen.world
        job = read_toml(chosen.job, Job, overrides=chosen.set)
        return _show_layout(job, [rank // ranks_per_node for rank in range(chosen.world)])
    world = World.start(debug=chosen.debug)
    with world.guard():
        job = world.collectively(lambda: read_toml(chosen.job, Job, overrides=chosen.set))
        if chosen.dry_run:
            as_if = TopologySection(ranks_per_node=chosen.ranks_per_node)
            topology, _ = world.by_node(as_if if chosen.ranks_per_node else job.topology)
            return world.collectively(lambda: _show_layout(job, topology.nodes) if world.rank == 0 else 0)
        text = Path(chosen.job).read_text(encoding="utf-8")
        overrides = "".join(f"# --set {override}\n" for override in chosen.set)
        return run_job(job, job_text=text + overrides, world=world, stop=stop, strict=chosen.strict)


def _show_layout(job: Any, nodes: Sequence[int]) -> int:
    from moempi.commands.dry_run import dry_run
    from moempi.errors import ConfigError
    from moempi.observe.run_report import print_layout

    layout = dry_run(job, nodes)
    print_layout(layout)
    return ConfigError.exit_code if layout.refused else 0


def convert(chosen: argparse.Namespace) -> int:
    """Convert a checkpoint folder into one weight file."""
    from moempi.storage.convert import convert as convert_checkpoint

    convert_checkpoint(chosen.checkpoint, chosen.weights)
    return 0


def init(chosen: argparse.Namespace) -> int:
    """Write random weights for an architecture."""
    from moempi.config.architecture import Architecture
    from moempi.config.reading import read_toml
    from moempi.storage.initialize import initialize

    initialize(read_toml(chosen.architecture, Architecture), chosen.weights, seed=chosen.seed)
    return 0


def inspect(chosen: argparse.Namespace) -> int:
    """Print what a weight or results file holds."""
    from moempi.observe.console import console
    from moempi.storage.inspect import describe

    console().print(describe(chosen.file))
    return 0


def show(chosen: argparse.Namespace) -> int:
    """Print the first answers of a finished job."""
    from moempi.config.job import Job
    from moempi.config.reading import read_toml
    from moempi.observe.run_report import Answer, print_answers
    from moempi.storage.prompts import read_prompts
    from moempi.storage.results import ResultFile

    job = read_toml(chosen.job, Job, overrides=chosen.set)
    prompts = read_prompts(job.input.prompts, sampling=job.sampling, strict=False)
    with ResultFile(job.output.results) as results:
        pairs = islice(zip(prompts, results.requests(), strict=True), chosen.first)
        print_answers([Answer(prompt.text or prompt.id, record.text, record.reference) for prompt, record in pairs])
    return 0


def state(chosen: argparse.Namespace) -> int:
    """Print the state, finished requests and exit code of a job's last run."""
    from moempi.config.job import Job
    from moempi.config.reading import read_toml
    from moempi.storage.run_state import read_state

    found = read_state(read_toml(chosen.job, Job, overrides=chosen.set).output.results)
    print(found.state, found.finished, found.exit_code, found.reason)
    return 0


def export(chosen: argparse.Namespace) -> int:
    """Write a results file as JSON lines."""
    from moempi.storage.export import export as export_results

    export_results(chosen.results, chosen.lines)
    return 0


def compare(chosen: argparse.Namespace) -> int:
    """Compare two results files of the same requests."""
    from moempi.errors import DataError
    from moempi.storage.compare import compare as compare_results

    found = compare_results(chosen.first, chosen.second)
    equal = f"log-probabilities within {found.largest:.3g}"
    print(f"{found.requests} requests, {found.different} differ in tokens; {equal}")
    return DataError.exit_code if found.different or found.largest > chosen.within else 0


def place(chosen: argparse.Namespace) -> int:
    """Choose where experts stand from the recorded routing of a run."""
    from moempi.commands.place import PlacementRequest, place_experts
    from moempi.config.topology_file import read_topology
    from moempi.layout.topology import LEVELS
    from moempi.observe.placement_table import print_policies

    if not 0 <= chosen.replicas <= MOST_REPLICAS:
        raise UsageError(f"--replicas {chosen.replicas}: a share of the experts from 0 to {MOST_REPLICAS}")
    wish = PlacementRequest(
        replicas=chosen.replicas,
        topology=read_topology(chosen.topology) if chosen.topology else None,
        ranks=chosen.ranks,
        ranks_per_node=chosen.ranks_per_node,
        row_s=chosen.row_us * 1e-6,
        tokens=chosen.tokens,
    )
    rows = place_experts(chosen.results, wish, policy=chosen.policy, out=chosen.out)
    print_policies(rows, title=f"{chosen.results}, {chosen.replicas:.0%} replicas", levels=LEVELS)
    return 0


def plan(chosen: argparse.Namespace) -> int:
    """Forecast a job on a machine that need not be there."""
    from moempi.commands.plan import forecast_job, print_what_if
    from moempi.config.job import Job
    from moempi.config.machine_file import read_machine
    from moempi.config.reading import read_toml
    from moempi.layout.topology import virtual

    job = read_toml(chosen.job, Job, overrides=chosen.set)
    machine = read_machine(chosen.machine)
    where = virtual(chosen.ranks, chosen.ranks_per_node or chosen.ranks)
    forecasts = forecast_job(job, machine, where, context=chosen.context, prompt=chosen.prompt)
    print_what_if(forecasts, machine=machine.name)
    return 0


def check(chosen: argparse.Namespace) -> int:
    """Measure the ranks' exchange, and their links where asked."""
    WITNESS.fork()
    from moempi.comm.transport_probe import check as check_ranks
    from moempi.observe.console import console
    from moempi.runtime.world import World

    world = World.start(debug=chosen.debug)
    with world.guard():
        findings = check_ranks(world)
        if findings is not None:
            console().print(findings)
        if chosen.measure or chosen.output:
            _measure(world, chosen)
    return 0


def _measure(world: Any, chosen: argparse.Namespace) -> None:
    import msgspec

    from moempi.backend.select import find_island
    from moempi.comm.link_probe import measure, topology_table
    from moempi.config.job import TopologySection
    from moempi.observe.console import console
    from moempi.storage.files import atomic

    island = find_island(world.local_rank, on_gpu=True)
    file, trials = measure(*world.by_node(TopologySection(ranks_per_node=chosen.ranks_per_node), island=island))
    if world.rank == 0:
        console().print(topology_table(file, trials))
        if chosen.output:
            with atomic(chosen.output) as temporary:
                Path(temporary).write_bytes(msgspec.json.encode(file))


def bench(chosen: argparse.Namespace) -> int:
    """Run a benchmark."""
    WITNESS.fork()
    from moempi.bench import main as bench_main

    return bench_main(chosen.name, chosen.arguments)


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line with the exit code of a usage error."""

    def error(self, message: str) -> NoReturn:
        self.exit(_fail(f"{message}; see {self.prog} --help", UsageError.exit_code, once=True))


def _parser() -> argparse.ArgumentParser:
    everywhere = _Parser(add_help=False)
    everywhere.add_argument("--debug", action="store_true", help="print the traceback of an error")
    parser = _Parser(prog="moempi", description="Mixture-of-Experts inference over MPI.")
    parser.add_argument("--version", action="version", version=f"moempi {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(command: Callable[[argparse.Namespace], int]) -> argparse.ArgumentParser:
        summary = (command.__doc__ or "").rstrip(".")
        sub = commands.add_parser(command.__name__, help=summary, description=summary, parents=[everywhere])
        sub.set_defaults(command=command)
        return sub

    _run_options(add(run))
    sub = add(convert)
    sub.add_argument("checkpoint", type=Path, metavar="HF_DIR", help="folder with config.json and *.safetensors")
    sub.add_argument("weights", type=Path, metavar="OUT.h5")
    sub = add(init)
    sub.add_argument("architecture", type=Path, metavar="ARCH.toml")
    sub.add_argument("weights", type=Path, metavar="OUT.h5")
    sub.add_argument("--seed", type=int, default=0, help="seed of the random weights (0)")
    add(inspect).add_argument("file", type=Path, metavar="FILE.h5")
    sub = add(export)
    sub.add_argument("results", type=Path, metavar="RESULTS.h5")
    sub.add_argument("lines", type=Path, metavar="OUT.jsonl")
    sub = add(show)
    _job_options(sub)
    sub.add_argument("--first", type=int, default=10, metavar="N", help="how many answers (10)")
    _job_options(add(state))
    sub = add(compare)
    sub.add_argument("first", type=Path, metavar="A.h5")
    sub.add_argument("second", type=Path, metavar="B.h5")
    sub.add_argument("--within", type=float, default=0.0, help="largest difference of log-probabilities allowed (0)")
    _plan_options(add(plan))
    _place_options(add(place))
    sub = add(check)
    sub.add_argument("--measure", action="store_true", help="latency and bandwidth of each level of links")
    sub.add_argument("--output", "-o", type=Path, metavar="topology.json", help="write them, for moempi place")
    sub.add_argument("--ranks-per-node", type=int, default=0, metavar="N", help="virtual nodes of N ranks")
    sub = add(bench)
    sub.add_argument("name", choices=BENCHMARKS)
    sub.add_argument("arguments", nargs=argparse.REMAINDER, help="the benchmark's own arguments")
    return parser


def _job_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("job", type=Path, metavar="JOB.toml")
    sub.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", help="override a job key")


def _run_options(sub: argparse.ArgumentParser) -> None:
    _job_options(sub)
    sub.add_argument("--dry-run", action="store_true", help="print layout and memory, read no weights")
    sub.add_argument("--world", type=int, default=0, metavar="N", help="dry run as if on N ranks, without MPI")
    sub.add_argument("--ranks-per-node", type=int, default=0, metavar="N", help="dry run: ranks on a node")
    sub.add_argument("--max-minutes", type=float, metavar="N", help="end early after N minutes, with exit code 75")
    sub.add_argument("--strict", action="store_true", help="stop at the first bad prompt line instead of recording it")


def _plan_options(sub: argparse.ArgumentParser) -> None:
    _job_options(sub)
    sub.add_argument("--machine", type=Path, required=True, metavar="MACHINE.toml", help="what ranks and links can do")
    sub.add_argument("--ranks", type=_count, required=True, metavar="N", help="ranks")
    sub.add_argument("--ranks-per-node", type=_count, default=0, metavar="N", help="ranks on a node (all)")
    sub.add_argument("--context", type=_count, default=2048, metavar="N", help="decode: tokens in the cache (2048)")
    sub.add_argument("--prompt", type=_count, default=4096, metavar="N", help="prefill: tokens of a prompt (4096)")


def _place_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("results", type=Path, metavar="RESULTS.h5", help="of a run with trace.routing = true")
    sub.add_argument("-o", "--out", type=Path, metavar="PLACEMENT.json", help="write the policy's placement")
    sub.add_argument("--policy", choices=["linear", "balanced", "topology"], default="topology", help="(topology)")
    sub.add_argument("--replicas", type=float, default=0.0, metavar="SHARE", help="copies, as a share of experts (0)")
    sub.add_argument("--topology", type=Path, metavar="TOPOLOGY.json", help="the links, as check --measure wrote them")
    sub.add_argument("--ranks", type=_count, default=0, metavar="N", help="ranks of a stage (those of the run)")
    sub.add_argument("--ranks-per-node", type=_count, default=0, metavar="N", help="with --ranks: ranks on a node")
    sub.add_argument(
        "--row-us", type=float, default=0.0, metavar="US", help="time of a row at an expert (that of the run)"
    )
    sub.add_argument("--tokens", type=_count, default=200_000, metavar="N", help="look at so many (the first 200000)")


def _count(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text} is not a number from 1 on")
    return int(text)


def _fail(text: str, code: int, *, debug: bool = False, once: bool = False) -> int:
    if once and not launched_first(os.environ):
        time.sleep(GRACE_S)  # leaving sooner, this process would have the launcher end the first one unheard
        return code
    if debug:
        traceback.print_exc()
    print(f"moempi: {' '.join(text.split())}", file=sys.stderr)
    return code
