"""`moempi bench layer`: one Mixture-of-Experts layer, from router to combine, and the same block of transformers."""

from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from functools import partial
from statistics import median
from time import perf_counter
from typing import Literal

from moempi.arrays import Float32Array
from moempi.backend.select import make_backend
from moempi.bench import peers
from moempi.bench.measure import add_products_flag, alternate, check_products, machine, product_clock, ratio
from moempi.bench.random_layer import Sizes, add_size_flags, make_exchange, make_layer, make_rows, run_to_end
from moempi.comm.combine import HomeCombine
from moempi.comm.hop import Hop
from moempi.comm.select_transport import fastest, make_transport
from moempi.comm.transfers import PendingTransfers, Transfers
from moempi.comm.transports.loopback import Loopback
from moempi.commands.flags import count
from moempi.config.job import RunSection
from moempi.layout.placement import linear
from moempi.observe.console import console, figures_table
from moempi.runtime.world import World

Precision = Literal["bfloat16", "float32"]
PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16")
OURS, ALONE = "moempi", "moempi on one rank"


def add_flags(parser: ArgumentParser) -> None:
    """The benchmark's own flags."""
    add_size_flags(parser)
    parser.add_argument("--tokens", type=count, nargs="+", default=[512, 16], metavar="T", help="rows in all (512 16)")
    parser.add_argument("--rounds", type=count, default=9, help="measurements of each contestant (9)")
    add_products_flag(parser)


def run(world: World, chosen: Namespace) -> None:
    """Measure and print; collective.

    The rows are divided evenly among the ranks; transformers runs on rank 0, with a thread for each rank.
    """
    check_products(world, chosen.products)
    sizes = Sizes.of(chosen)
    table = figures_table(
        *("T", "precision", "moempi ms", "in GEMM", "one rank ms", "ranks gain", "peer ms", "peer", "peer / moempi"),
        title=f"MoE layer, D={sizes.width} F={sizes.expert_width} E={sizes.num_experts} K={sizes.top_k}, "
        f"{chosen.products} products",
        caption=machine(world),
    )
    for num_rows in chosen.tokens:
        for precision in PRECISIONS:
            table.add_row(str(num_rows), precision, *_measure(world, sizes, num_rows, precision, chosen))
    if world.rank == 0:
        console().print(table)


def _measure(world: World, sizes: Sizes, num_rows: int, precision: Precision, chosen: Namespace) -> list[str]:
    """The cells of one table row; collective."""
    rounds, run = chosen.rounds, RunSection(backend="numpy", precision=precision, products=chosen.products)
    rows = make_rows(num_rows, sizes.width)
    bounds = [rank * num_rows // world.size for rank in range(world.size + 1)]
    make_layer_on = partial(layer_on, world, sizes, run, num_rows=num_rows)
    ours = partial(make_layer_on(), rows[bounds[world.rank] : bounds[world.rank + 1]])
    contestants: dict[str, Callable[[], object]] = {OURS: ours}
    if world.size > 1:
        alone = partial(make_layer_on(alone=True), rows)
        contestants[ALONE] = alone if world.rank == 0 else _do_nothing
    blocks = peers.moe_blocks(sizes, rows, precision=precision, threads=world.size)
    contestants |= {name: block if world.rank == 0 else _do_nothing for name, block in blocks.items()}
    taken = alternate(world, contestants, rounds=rounds)
    share = _gemm_share(world, ours, rounds=rounds)
    best = min(blocks, key=lambda name: median(taken[name]), default=None)
    return [
        _ms(taken[OURS]),
        f"{share:.2f}",
        _ms(taken[ALONE]) if world.size > 1 else "",
        f"{ratio(taken[ALONE], taken[OURS]):.2f}" if world.size > 1 else "",
        _ms(taken[best]) if best else "not installed",
        best or "",
        f"{ratio(taken[best], taken[OURS]):.2f}" if best else "",
    ]


def layer_on(
    world: World, sizes: Sizes, run: RunSection, *, num_rows: int, alone: bool = False
) -> Callable[[Float32Array], Float32Array]:
    """A function that computes the layer for this rank's rows, of `num_rows` in all; collective, blocks.

    Rows travel by the transport that the program chooses. Calls are collective unless each rank is `alone`.
    """
    comm, nodes = world.comm.Dup(), world.nodes
    if alone:
        comm, nodes = world.comm.Create_group(world.comm.group.Incl([world.rank])), (0,)
    pending = PendingTransfers()
    backend = make_backend(run, local_rank=world.local_rank, device_buffers=False, progress=pending.progress)
    placement = linear(sizes.num_experts, comm.size)
    width, row_bytes = sizes.width, sizes.width * backend.row_dtype.itemsize
    name = Loopback.name if comm.size == 1 else fastest(comm, comm, backend, width=width, nodes=nodes).name
    slot_bytes = num_rows * sizes.top_k * row_bytes
    transport = make_transport(name, comm, backend, width=width, nodes=nodes, slot_bytes=slot_bytes)
    transfers = Transfers(backend, pending)
    exchange = make_exchange(Hop(comm, backend, transfers=transfers, transport=transport), placement)
    combine = HomeCombine(exchange)
    layer = make_layer(sizes, backend, hosted=placement.hosted[comm.rank])

    def compute(rows: Float32Array) -> Float32Array:
        result: Float32Array = run_to_end(layer.forward(backend, rows, exchange, combine)).rows
        return result

    return compute


def _gemm_share(world: World, compute: Callable[[], object], *, rounds: int) -> float:
    """The share of matrix products in the layer's time: the median over rounds on this rank; collective."""
    shares = []
    for _ in range(rounds):
        world.comm.Barrier()
        with product_clock() as clock:
            begin = perf_counter()
            compute()
            shares.append(clock.seconds / (perf_counter() - begin))
    return median(shares)


def _ms(taken: list[float]) -> str:
    return f"{median(taken) * 1e3:.2f}"


def _do_nothing() -> None:
    """The turn of the other ranks while rank 0 computes alone."""
