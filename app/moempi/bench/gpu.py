"""`moempi bench gpu`: the parts of a layer and whole layers on one GPU, beside its own copy, cuBLAS and torch.

The default sizes are of a layer with width 7,168. Times on the GPU are by its own clock, of calls that were submitted
before the first of them began; "host us" is the host's time to submit one. Every figure is the median over rounds in
which the contestants run alternately. Torch is measured if it can use the GPU. A part that fails has its error as a
note, and the others go on. Each figure is also printed to stderr when it is measured.
"""

import gc
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from moempi.backend.cuda.backend import CudaBackend
from moempi.backend.select import make_backend
from moempi.bench.gpu_attention import decode_cases, preemption_cases, prefill_cases
from moempi.bench.gpu_clock import EventClock, Timer, describe
from moempi.bench.gpu_layer import block_cases, layer_cases
from moempi.bench.gpu_parts import Make, copy_case, expert_cases, packing_cases, small_cases
from moempi.bench.gpu_report import COPY, Bench, Figure, cells, measure_case, table, write_json
from moempi.bench.measure import machine
from moempi.bench.random_values import RandomValues
from moempi.bench.torch_peers import TorchPeers, find_torch
from moempi.comm.transfers import PendingTransfers
from moempi.commands.flags import count
from moempi.config.job import RunSection
from moempi.errors import ConfigError
from moempi.observe.console import console, error_console
from moempi.runtime.world import World

Cases = Callable[[Bench, Namespace, Any], Iterator[Make]]
PARTS: Mapping[str, Cases] = {
    "experts": lambda bench, sizes, _: expert_cases(bench, sizes),
    "packing": lambda bench, sizes, _: packing_cases(bench, sizes),
    "small": lambda bench, sizes, _: small_cases(bench, sizes),
    "decode": lambda bench, sizes, _: decode_cases(bench, sizes),
    "prefill": lambda bench, sizes, _: prefill_cases(bench, sizes),
    "preemption": lambda bench, sizes, _: preemption_cases(bench, sizes),
    "layer": layer_cases,
    "blocks": block_cases,
}


def add_flags(parser: ArgumentParser) -> None:
    """The benchmark's own flags."""
    add = parser.add_argument
    add("--parts", nargs="+", choices=tuple(PARTS), default=list(PARTS), help="what to measure (all)")
    add("--json", type=Path, metavar="FILE", help="also write all figures to FILE, as a list")
    add("--width", type=count, default=7168, metavar="D", help="width of a row (7168)")
    add("--expert-width", type=count, default=2048, metavar="F", help="hidden width of an expert (2048)")
    add("--experts", type=count, default=64, metavar="E", help="experts of the router and the MoE layer (64)")
    add("--top-k", type=count, default=8, metavar="K", help="experts of a token (8)")
    add("--heads", type=count, default=128, help="attention heads (128)")
    add("--head-dim", type=count, default=128, help="numbers of a head (128)")
    add("--context", type=count, default=4096, help="positions of a sequence (4096)")
    add("--few", type=count, nargs="+", default=[1, 16, 64], metavar="M", help="rows of small experts (1 16 64)")
    add("--many", type=count, nargs="+", default=[1024, 4096, 16384], metavar="M", help="of large ones")
    add("--sequences", type=count, nargs="+", default=[32], help="sequences that decode at once (32)")
    add("--layers", type=count, default=8, help="most layers that a lane goes through (8)")
    add("--capture", action="store_true", help="whole layers up to packed rows as CUDA graphs (run.capture)")
    add("--layer-heads", type=count, nargs="+", default=[16, 128], metavar="H", help="heads of whole layers (16 128)")
    add("--layer-lanes", type=count, nargs="+", default=[1, 2], metavar="N", help="lanes of whole layers (1 2)")
    add("--layer-sequences", type=count, default=64, help="sequences of a lane that decode in whole layers (64)")
    add("--layer-context", type=count, default=2048, help="their positions (2048)")
    add("--block-rows", type=count, nargs="+", default=[64, 256, 8192], metavar="T", help="rows of MoE layers")
    add("--rounds", type=count, default=5, help="measurements of each contestant (5)")
    add("--repeats", type=count, default=50, help="most calls of a measurement (50)")


def run(world: World, chosen: Namespace) -> None:
    """Measure on the GPU of rank 0 and print; collective. Raises ConfigError without a GPU."""
    pending = PendingTransfers()
    backend = world.collectively(lambda: _backend(world, pending, capture=chosen.capture))
    alone = world.comm.Split(world.rank, 0)
    if world.rank == 0:
        from moempi.bench.gpu_timer import CudaTimer

        measured = measure(backend, CudaTimer(), _peers(), pending, alone, chosen)
        _measure_and_print(measured, title=backend.device.name, caption=machine(world), path=chosen.json)
    world.comm.Barrier()


def _measure_and_print(measured: Iterator[Figure], *, title: str, caption: str, path: Path | None) -> None:
    """Print each figure to stderr and write all so far to `path`; then, also after an error, print their table."""
    figures = [Figure("machine", "", "", note=f"{title}, {caption}")]
    try:
        for figure in measured:
            figures.append(figure)
            error_console().print(" | ".join(cells(figure)), soft_wrap=True)
            if path is not None:
                write_json(path, figures)
    finally:
        whole = table(title, caption)
        for figure in figures[1:]:
            whole.add_row(*cells(figure))
        console().print(whole)


def _backend(world: World, pending: PendingTransfers, *, capture: bool) -> CudaBackend:
    run = RunSection(backend="cupy", capture=capture)
    backend = make_backend(run, local_rank=world.local_rank, device_buffers=True, progress=pending.progress)
    if not isinstance(backend, CudaBackend):
        raise ConfigError("bench gpu needs a GPU")
    return backend


def _peers() -> TorchPeers:
    """Torch's contestants; none, with a line on stderr, if torch does not load."""
    try:
        return TorchPeers(find_torch())
    except Exception as error:
        error_console().print(f"torch: {describe(error)}")
        return TorchPeers(None)


def measure(
    backend: CudaBackend, timer: Timer, peers: TorchPeers, pending: PendingTransfers, comm: Any, chosen: Namespace
) -> Iterator[Figure]:
    """Yield all figures of one GPU as they are measured.

    The backend advances the `pending` transfers of the layers; `comm` is a communicator of this rank alone.
    """
    clock = EventClock(timer, rounds=chosen.rounds, most_repeats=chosen.repeats)
    bench = Bench(backend, clock, RandomValues(backend.device), peers, pending)
    gc.collect()
    gc.freeze()  # so that the collections below are short
    with peers.on_stream(timer.stream):
        copied = measure_case(bench, COPY, lambda: copy_case(bench, chosen), copy_rate=None)
        yield from copied
        copy_rate = copied[0].rate
        for part in chosen.parts:
            for name, make in PARTS[part](bench, chosen, comm):
                yield from measure_case(bench, name, make, copy_rate=copy_rate)
                gc.collect()
                peers.free_memory()
                timer.free_memory()
