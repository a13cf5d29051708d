"""The job file: what to run, on what, and how. Names and defaults are documented in jobs/README.md."""

from typing import Annotated, Literal

from msgspec import Meta, Struct

from moempi.config.architecture import LARGEST, Count, Index, Positive

Fraction = Annotated[float, Meta(gt=0, le=1)]
Size = Annotated[str, Meta(pattern=r"^(auto|[0-9]+(\.[0-9]+)?\s*([KMGT]i?)?B)$")]


class ModelSection(Struct, frozen=True, forbid_unknown_fields=True):
    """`[model]`: the weight file; `architecture` is what a dry run takes when that file is not there."""

    weights: str
    architecture: str = ""


class InputSection(Struct, frozen=True, forbid_unknown_fields=True):
    """`[input]`: the prompts, a .jsonl or an .h5 file."""

    prompts: str


class OutputSection(Struct, frozen=True, forbid_unknown_fields=True):
    """`[output]`: the results file."""

    results: str


class RunSection(Struct, frozen=True, forbid_unknown_fields=True):
    """`[run]`: how the ranks compute."""

    backend: Literal["auto", "numpy", "cupy"] = "auto"
    precision: Literal["bfloat16", "float32"] = "bfloat16"
    reproducible: bool = False
    overlap: bool = True
    micro_batches: Count | Literal["auto"] = 2
    max_sequences: Count = 32
    batch_tokens: Count = 512
    kv_memory: Size = "auto"
    timeout_s: Positive = 300.0


class Sampling(Struct, frozen=True, forbid_unknown_fields=True):
    """`[sampling]`, and the keys that a prompt line may override."""

    max_tokens: Count = 16
    temperature: Annotated[float, Meta(ge=0, le=LARGEST)] = 0.0
    top_k: Index = 0
    top_p: Fraction = 1.0
    min_p: Annotated[float, Meta(ge=0, le=1)] = 0.0
    repetition_penalty: Positive = 1.0
    seed: Index = 0
    stop: tuple[Annotated[str, Meta(min_length=1)], ...] = ()
    ignore_eos: bool = False
    top_logprobs: Index = 0


class ScoreSection(Struct, frozen=True, forbid_unknown_fields=True):
    """`[score]`: what the score task writes beside each token's log-probability."""

    top_n: Index = 0


class ExchangeSection(Struct, frozen=True, forbid_unknown_fields=True):
    """`[exchange]`: how rows travel between ranks; `auto` takes the transport that is fastest in a probe.

    With 2 `hops` a row crosses the network once per node and goes on to its experts inside; sums are re-associated.
    `verify` compares checksums of all rows at both ends. With `immediate` the last experts of a stage answer straight
    to the next stage. `buffers` says where GPUs keep rows that travel: in their own memory, for an MPI that takes it,
    or in host memory, which they read and write over the bus; "auto" finds out.
    """

    transport: Literal["auto", "alltoallv", "pairwise", "shared"] = "auto"
    hops: Literal[1, 2] = 1
    verify: bool = False
    buffers: Literal["auto", "device", "host"] = "auto"
    immediate: bool = False


class ParallelSection(Struct, frozen=True, forbid_unknown_fields=True):
    """`[parallel]`: how ranks form stages, tensor groups and data parallel groups.

    `stage_layers` and `stage_ranks` say how many layers and ranks each stage has; empty means balanced by cost, and
    even. `experts_per_rank` is the most experts of a layer that a rank may host; 0 for any number.
    """

    stages: Count = 1
    stage_layers: tuple[Count, ...] = ()
    stage_ranks: tuple[Count, ...] = ()
    tensor: Count = 1
    experts_per_rank: Index = 0


class BalanceSection(Struct, frozen=True, forbid_unknown_fields=True):
    """`[balance]`: what may move choices away from busy experts, at a price in quality; "off" leaves the model's own.

    "bias" adds a term to the scores that select, at most `bound`, which changes by `rate` a step at most; "capacity"
    lets no expert take more than `capacity` times an even share of a step. `sample` requests are scored with and
    without it at the end, to tell the price. What a row computes then depends on the rows beside it.
    """

    mode: Literal["off", "bias", "capacity"] = "off"
    rate: Positive = 0.03
    bound: Positive = 0.5
    capacity: Annotated[float, Meta(ge=1, le=LARGEST)] = 1.25
    sample: Index = 16


class TopologySection(Struct, frozen=True, forbid_unknown_fields=True):
    """`[topology]`: what to assume of the machine instead of asking it.

    `ranks_per_node` above 0 makes virtual nodes of as many ranks; `file` is a topology.json that says where the ranks
    stand. `rank_memory` is the memory of a rank. `emulate` is a topology.json too: rows to experts take the time that
    its links would, on top of the real exchange.
    """

    ranks_per_node: Index = 0
    file: str = ""
    rank_memory: Size = "auto"
    emulate: str = ""


class PlacementSection(Struct, frozen=True, forbid_unknown_fields=True):
    """`[placement]`: where experts stand; `file` is a placement.json, empty for even shares in ascending order."""

    file: str = ""


class TraceSection(Struct, frozen=True, forbid_unknown_fields=True):
    """`[trace]`: what to record of a run beside its answers.

    `routing` keeps the experts and weights that each router chose for each token.
    """

    routing: bool = False


class Job(Struct, frozen=True, forbid_unknown_fields=True):
    """A whole job file."""

    model: ModelSection
    input: InputSection
    output: OutputSection
    task: Literal["generate", "score"] = "generate"
    run: RunSection = RunSection()
    sampling: Sampling = Sampling()
    score: ScoreSection = ScoreSection()
    exchange: ExchangeSection = ExchangeSection()
    parallel: ParallelSection = ParallelSection()
    topology: TopologySection = TopologySection()
    placement: PlacementSection = PlacementSection()
    balance: BalanceSection = BalanceSection()
    trace: TraceSection = TraceSection()

    @property
    def lanes(self) -> int:
        """Micro-batches in flight: `auto` fills the pipeline with a pair a stage."""
        return 2 * self.parallel.stages if self.run.micro_batches == "auto" else self.run.micro_batches
