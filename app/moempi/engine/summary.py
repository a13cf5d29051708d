"""The end of a run: the record of each rank, the provenance of the results, and the report."""

import math
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple, cast

import msgspec
import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from moempi import __version__
from moempi.comm.transfers import WAITS
from moempi.comm.transports.counted import no_counts
from moempi.config.architecture import Architecture
from moempi.config.job import Job
from moempi.engine.balance import Balance
from moempi.engine.earlier import FINISHES, Earlier
from moempi.engine.lane import Lane
from moempi.engine.lanes import Lanes
from moempi.engine.latency import Latencies, no_latencies, percentiles
from moempi.engine.load import Loading
from moempi.engine.rank_layout import RankLayout
from moempi.engine.recorder import Recorder
from moempi.engine.replay import ReplayPolicy
from moempi.observe.run_figures import Report
from moempi.runtime.reductions import gather_on_root, sum_on_all, sum_on_root
from moempi.runtime.world import World
from moempi.storage.merge import Provenance
from moempi.storage.records import RankRecord, decode, encode
from moempi.storage.results_layout import NOWHERE

LOADS = ("expert_load", "asked_load", "shifts")
"""The arrays of a record by layer and expert, of which the results hold the sums over all ranks."""
PACKAGES = ("numpy", "h5py", "mpi4py", "tokenizers", "msgspec", "xxhash")


class RankRun(Struct, frozen=True):
    """The objects of a rank's run that its record is made from; all steps took `seconds`."""

    rank_layout: RankLayout
    lanes: Lanes
    recorder: Recorder
    loading: Loading
    seconds: float


def rank_record(world: World, run: RankRun, *, hops: int) -> RankRecord:
    """The record of one rank, which counts all time in which the rank was not blocked as compute."""
    lanes, model, rank_layout = run.lanes.each, run.lanes.each[0].context.model, run.rank_layout
    waits = {kind: sum(lane.comm.transfers.waits[kind] for lane in lanes) for kind in WAITS}
    waits["disk"] = run.recorder.disk_s
    load = _expert_load(lanes, model.architecture)
    coords = rank_layout.coords
    return RankRecord(
        rank=world.rank,
        host=world.host,
        expert_load=load,
        seconds={"compute": run.seconds - sum(waits.values()), **waits},
        loaded_bytes=run.loading.num_bytes,
        loading_s=run.loading.seconds,
        steps=run.recorder.steps,
        tokens=run.recorder.tokens,
        counters={name: sum(lane.comm.transfers.counters[name] for lane in lanes) for name in no_counts()},
        place={
            "seat": rank_layout.ranks.rank,
            **_rank_position(rank_layout),
            "stage": coords.stage,
            "data": coords.data,
            "tensor": coords.tensor,
            "hops": hops,
            "departs": int(lanes[0].comm.immediate is not None),
            "row_bytes": model.architecture.routed_width * model.backend.row_dtype.itemsize,
        },
        hosted=dict(rank_layout.hosted),
        replay=_replay_counts(lanes),
        **_balance_columns(run.lanes.balance, load, first_of_stage=coords.data == coords.tensor == 0),
    )


def _replay_counts(lanes: Sequence[Lane]) -> dict[str, int]:
    """The routes of this rank's rows that a file gave, and those that it changed; empty without a file."""
    policies = [lane.policy for lane in lanes if isinstance(lane.policy, ReplayPolicy)]
    if not policies:
        return {}
    return {
        "routes": sum(policy.replayed for policy in policies),
        "changed": sum(policy.changed for policy in policies),
    }


def _rank_position(rank_layout: RankLayout) -> dict[str, int]:
    """The node, island and switch of this rank, as columns of the results."""
    topology, rank = rank_layout.topology, rank_layout.ranks.rank
    columns = {"node": topology.nodes, "island": topology.islands, "switch": topology.switches}
    return {name: of_ranks[rank] if of_ranks else NOWHERE for name, of_ranks in columns.items()}


def _expert_load(lanes: Sequence[Lane], architecture: Architecture) -> NDArray[np.int64]:
    """Tokens that this rank's lanes routed to each expert of each layer (L, E)."""
    load = np.zeros((architecture.num_layers, architecture.experts.num), np.int64)
    for lane in lanes:
        for layer, counts in lane.comm.exchange.expert_load.items():
            load[layer] += counts
    return load


def _balance_columns(balance: Balance | None, load: NDArray[np.int64], *, first_of_stage: bool) -> dict[str, Any]:
    """The columns of a balanced run; the expert bias, equal on all ranks of a stage, from the first of them alone."""
    if balance is None:
        return {}
    bias = balance.bias_by_layer(len(load))
    return {
        "asked_load": balance.asked_load(len(load)),
        "shifts": bias if first_of_stage else np.zeros_like(bias),
        "balance": {"choices": float(load.sum()), "moved_choices": float(balance.moves.moved)},
    }


def make_provenance(job_text: str, job: Job, hosts: Sequence[str], *, weights: str, start: datetime) -> Provenance:
    """The provenance of the results of ranks on these hosts (R,), which computed `job`, whose file has this text."""
    from importlib.metadata import version

    return Provenance(
        job=job_text,
        versions={"moempi": __version__, **{package: version(package) for package in PACKAGES}},
        world_size=len(hosts),
        hosts=tuple(hosts),
        weights=weights,
        fast_products=job.run.products == "fast",
        start=start,
        end=datetime.now(UTC),
    )


class Totals(Struct, frozen=True):
    """The finished requests of the whole run, including earlier attempts; `exact` of `referenced` equal a reference."""

    finishes: Counter[str]
    exact: int
    referenced: int

    @property
    def num_finished(self) -> int:
        """Number of finished requests."""
        return self.finishes.total()

    @property
    def num_errors(self) -> int:
        """Number of finished requests that ended with an error."""
        return self.finishes["error"]


def sum_totals(recorder: Recorder, world: World) -> Totals:
    """The totals over all ranks, on each of them; collective, blocks."""
    own = [*(recorder.finishes[finish] for finish in FINISHES), recorder.exact, recorder.referenced]
    *finishes, exact, referenced = sum_on_all(world.comm, np.array(own, np.int64)).tolist()
    return Totals(+Counter(dict(zip(FINISHES, finishes, strict=True))), exact, referenced)


class Gathered(NamedTuple):
    """The records of all ranks in rank order, of which the first has the sums of their LOADS; and their latencies."""

    records: Sequence[RankRecord]
    latencies: Latencies


def gather_records(record: RankRecord, recorder: Recorder, world: World) -> Gathered:
    """The records and latencies of all ranks, on rank 0; nothing on the others. Collective, blocks."""
    loads = {name: sum_on_root(world.comm, getattr(record, name)) for name in LOADS}
    without_loads = msgspec.structs.replace(record, **{name: load[:0, :0] for name, load in loads.items()})
    gathered = gather_on_root(world.comm, msgspec.msgpack.encode((encode(without_loads), recorder.latencies)))
    records, latencies = [], no_latencies()
    for of_rank in gathered:
        encoded, of_kind = msgspec.msgpack.decode(of_rank, type=tuple[bytes, dict[str, dict[int, int]]])
        records.append(cast("RankRecord", decode(encoded)))
        for kind, counts in of_kind.items():
            latencies[kind].update(counts)
    first = [msgspec.structs.replace(one, **loads) for one in records[:1]]
    return Gathered([*first, *records[1:]], latencies)


def run_report(
    gathered: Gathered,
    totals: Totals,
    *,
    earlier: Earlier,
    results: str,
    transport: str,
    moe_layers: Sequence[int],
    slow_hosts: Sequence[str] = (),
) -> Report:
    """The figures of the whole run, from what `gather_records` and `sum_totals` return on rank 0."""
    records, latencies = gathered
    first = records[0]
    return Report(
        results=results,
        transport=transport,
        sent={name: sum(one.counters[name] for one in records) for name in first.counters},
        tokens=sum(one.tokens for one in records),
        wall_s=max(sum(one.seconds.values()) for one in records),
        seconds={phase: [one.seconds[phase] for one in records] for phase in first.seconds},
        expert_load=first.expert_load[list(moe_layers)],
        finishes=totals.finishes,
        exact=totals.exact,
        referenced=totals.referenced,
        latencies={name: percentiles(counts) for name, counts in latencies.items()},
        hosts=[one.host for one in records],
        loaded_bytes=sum(one.loaded_bytes for one in records),
        loading_s=[one.loading_s for one in records],
        earlier_requests=len(earlier.indices),
        earlier_tokens=earlier.tokens,
        slow_hosts=slow_hosts,
        replay=dict(sum((Counter(one.replay) for one in records), Counter())),
        **_balance_figures(records, list(moe_layers)),
    )


def _balance_figures(records: Sequence[RankRecord], moe_layers: list[int]) -> dict[str, Any]:
    """The figures of balancing over all ranks; empty if it was off."""
    if not records[0].balance:
        return {}
    choices, moved = (sum(one.balance[name] for one in records) for name in ("choices", "moved_choices"))
    return {
        "asked_load": records[0].asked_load[moe_layers],
        "moved": moved / choices if choices else 0.0,
        "logprob_change": records[0].balance.get("logprob_change", math.nan),
    }
