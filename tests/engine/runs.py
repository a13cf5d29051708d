"""A small run of the engine, made as `run_job` makes one: a random model, its requests, and all that lanes need."""

from contextlib import closing
from types import SimpleNamespace
from typing import Any

from mpi4py import MPI
from msgspec import structs

from engine.jobs import make_job
from engine.requests import EOS, make_request
from moempi.backend.cpu.backend import NumpyBackend
from moempi.comm.transfers import PendingTransfers
from moempi.config.architecture import Architecture, AttentionShape, DeltaRule, Experts, Rope, Router, StateSpace
from moempi.engine.engine import make_task
from moempi.engine.lane import LaneContext
from moempi.engine.lanes import Lanes, make_lanes
from moempi.engine.load import load_model
from moempi.engine.micro_batches import MicroBatches
from moempi.engine.rank_layout import RankLayout, lay_out_rank
from moempi.engine.recorder import Recorder
from moempi.engine.request import Request
from moempi.engine.scheduler import Scheduler
from moempi.engine.shard import Shard
from moempi.engine.tokenizer import TextTokenizer
from moempi.observe.progress import Counts
from moempi.runtime.world import World
from moempi.storage.initialize import initialize
from moempi.storage.journal import JournalWriter
from moempi.storage.weights import WeightFile

SMALL = Architecture(
    family="random",
    vocab_size=40,
    width=16,
    num_layers=4,
    max_positions=64,
    attention=AttentionShape(num_heads=2, num_kv_heads=2, head_dim=8),
    experts=Experts(num=4, width=8, router=Router(top_k=2)),
    dense_layers=(1,),
    dense_width=12,
)
STATEFUL = structs.replace(
    SMALL,
    max_positions=640,
    attention=structs.replace(SMALL.attention, output_gate=True, qk_norm="head"),
    norm="rms_float32",
    float32_norms=True,
    delta_rule=DeltaRule(num_key_heads=2, num_value_heads=4, key_dim=4, value_dim=6, taps=4),
    delta_layers=(0, 1, 3),
)
"""A model with layers that keep a state per sequence."""
SPACES = structs.replace(
    SMALL,
    num_layers=6,
    max_positions=640,
    attention=structs.replace(SMALL.attention, rope=Rope(dim=2, none=True)),
    norm="rms_float32",
    experts=structs.replace(SMALL.experts, shared_width=10),
    dense_layers=(4,),
    state_space=StateSpace(num_heads=4, head_dim=6, num_groups=2, state_dim=5, taps=4, least_step=0.1),
    state_space_layers=(0, 3),
    without_attention=(1, 4, 5),
    without_feed_forward=(0, 2, 3),
    activation="relu2",
)
"""A model whose layers are a state space, an attention without rope, experts or a dense network, each alone."""
LATENT_EXPERTS = structs.replace(SPACES, experts=structs.replace(SPACES.experts, latent_width=6))
"""A model whose experts compute in a latent width."""
PAGES = 8


class Tokenizer(TextTokenizer):
    """A text is the numbers of its tokens."""

    def __init__(self):
        super().__init__("", eos_tokens=(EOS,))

    def decode(self, tokens):
        return " ".join(map(str, tokens))


def numpy_backend(progress):
    return NumpyBackend(precision="float32", progress=progress)


class Run:
    """`requests` of the job and the `lanes` of this rank; `progress` lists what the recorder showed after each step."""

    def __init__(
        self,
        folder,
        requests=(),
        *,
        comm=MPI.COMM_SELF,
        architecture=SMALL,
        make_backend=numpy_backend,
        replay_of=None,
        **sections: Any,
    ):
        sections["run"] = {"precision": "float32", "batch_tokens": 24} | sections.get("run", {})
        sections["exchange"] = {"transport": "alltoallv"} | sections.get("exchange", {})
        job = make_job(folder, **sections)
        self.world = World(comm)
        self.rank_layout: RankLayout = lay_out_rank(job, self.world, architecture, on_gpu=False)
        pending = PendingTransfers()
        self.backend = make_backend(pending.progress)
        self.model = load(folder, self.backend, self.rank_layout, architecture=architecture)
        self.journal = JournalWriter(folder / f"{comm.rank}.part", fingerprint="run")
        self.progress: list[Counts] = []
        self.recorder = Recorder(
            self.journal,
            task=job.task,
            writes_records=self.rank_layout.writes_records,
            on_progress=self.progress.append,
            hidden=job.trace.hidden_positions if job.trace.hidden else None,
        )
        groups = self.rank_layout.grid.num_groups(0)
        is_first, data = self.rank_layout.is_first_stage, self.rank_layout.coords.data
        self.requests = list(requests)[data::groups] if is_first else []
        self.scheduler = Scheduler(
            self.requests,
            micro_batches=job.num_micro_batches,
            slots=self.rank_layout.grid.slots(0, data) if is_first else range(0),
            batch_tokens=job.run.batch_tokens,
            pages=PAGES,
        )
        self.stop = SimpleNamespace(requested=False, end_of_steps=lambda: None)
        task = make_task(job, Tokenizer(), top=0)
        context = LaneContext(self.model, self.scheduler, task, self.recorder, self.stop)
        self.lanes: Lanes = make_lanes(
            job, self.world, self.rank_layout, context, pending=pending, first_step=0, replay=replay_of
        )

    def points(self, lane: int = 0):
        """Run one lane alone; the points that it reaches."""
        micro_batches = MicroBatches(self.scheduler.num_micro_batches, num_lanes=len(self.lanes.each))
        for wait in self.lanes.each[lane].steps(micro_batches):
            yield wait.point


def load(folder, backend, rank_layout, *, architecture):
    """This rank's share of random weights."""
    path = folder / f"{rank_layout.ranks.rank}.h5"
    initialize(architecture, path, seed=7)
    with closing(WeightFile.open(path)) as file:
        grid = rank_layout.grid
        head = grid.head_part(rank_layout.ranks.rank), grid.head_ranks
        shard = Shard(file, part=rank_layout.coords.tensor, parts=grid.tensor, head=head)
        layers, pages = rank_layout.stage.layers, PAGES * rank_layout.num_groups
        slots = rank_layout.grid.slots(rank_layout.coords.stage, rank_layout.coords.data)
        return load_model(shard, backend, layers=layers, hosted=rank_layout.hosted, pages=pages, slots=slots)


def requests_of(*lengths: int, limit: int = 3) -> list[Request]:
    """A request for each length of a prompt."""
    return [
        make_request([2 + (3 * index + row) % 38 for row in range(length)], limit, index=index, ignore_eos=True)
        for index, length in enumerate(lengths)
    ]


def tokens_of(requests):
    return [request.tokens for request in requests]
