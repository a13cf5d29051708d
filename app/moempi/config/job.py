"""The job file. jobs/README.md documents its keys and defaults."""

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from moempi.config.architecture import LARGEST, MAX_LAYERS, Count, Index
from moempi.config.reading import STDIN, read_toml

Fraction = Annotated[float, Meta(gt=0, le=1)]
Seconds = Annotated[float, Meta(gt=0, le=1e8)]
Factor = Annotated[float, Meta(gt=0, le=1e6)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Token = Annotated[int, Meta(ge=0, le=2**31 - 1)]
Size = Annotated[str, Meta(pattern=r"^(auto|[0-9]{1,15}(\.[0-9]{1,15})?\s*([KMGT]i?)?B)$", max_length=40)]


HiddenPositions = Literal["all", "last", "output"]

MOST_LANES = 4
"""Lanes of a stage, if the job does not say: they hide the travel of rows in the mission's layout."""


class ModelSection(Struct, frozen=True, forbid_unknown_fields=True):
    """`[model]`: the weight file; `architecture` is the file that a dry run reads if there is no weight file."""

    weights: str
    architecture: str = ""


class InputSection(Struct, frozen=True, forbid_unknown_fields=True):
    """`[input]`: the prompts, a file or "-" for stdin, and how they are read.

    `column` is the column of a CSV or Parquet file to use. With `special_tokens` the text of a special token in a
    prompt is that token. At least `ahead` requests are read before the first step, and again when they run short; 0:
    all requests are.
    """

    prompts: str
    column: str = ""
    special_tokens: bool = True
    ahead: Annotated[int, Meta(ge=0)] = 65_536


class OutputSection(Struct, frozen=True, forbid_unknown_fields=True):
    """`[output]`: the results file, and whether texts in it have special tokens."""

    results: str
    special_tokens: bool = False


class RunSection(Struct, frozen=True, forbid_unknown_fields=True):
    """`[run]`: backend, precision, batching and memory."""

    backend: Literal["auto", "numpy", "cupy"] = "auto"
    precision: Literal["bfloat16", "float32"] = "bfloat16"
    reproducible: bool = False
    capture: bool = False
    products: Literal["exact", "fast"] = "exact"
    threads: Annotated[int, Meta(ge=1, le=1024)] | Literal["auto"] = "auto"
    overlap: bool = True
    micro_batches: Annotated[int, Meta(ge=1, le=4096)] | Literal["auto"] = 2
    lanes: Annotated[int, Meta(ge=1, le=64)] | Literal["auto"] = "auto"
    max_sequences: Annotated[int, Meta(ge=1, le=1_000_000)] = 32
    batch_tokens: Annotated[int, Meta(ge=1, le=1 << 24)] = 512
    kv_memory: Size = "auto"
    timeout_s: Seconds = 300.0


class Sampling(Struct, frozen=True, forbid_unknown_fields=True):
    """`[sampling]`: all keys but `defaults`, which says whose they are, may be overridden by a prompt line."""

    max_tokens: Count = 16
    defaults: Literal["fixed", "model"] = "fixed"
    n: Annotated[int, Meta(ge=1, le=1024)] = 1
    min_tokens: Index = 0
    temperature: Annotated[float, Meta(ge=0, le=LARGEST)] = 0.0
    top_k: Index = 0
    top_p: Fraction = 1.0
    min_p: Annotated[float, Meta(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Meta(ge=1e-6, le=1e6)] = 1.0
    presence_penalty: Penalty = 0.0
    frequency_penalty: Penalty = 0.0
    logit_bias: dict[Token, Annotated[float, Meta(ge=-100, le=100)]] = {}
    seed: Index = 0
    stop: tuple[Annotated[str, Meta(min_length=1)], ...] = ()
    stop_token_ids: tuple[Index, ...] = ()
    ignore_eos: bool = False
    top_logprobs: Index = 0


class ChatSection(Struct, frozen=True, forbid_unknown_fields=True):
    """`[chat]`: what the chat template is given beside the messages of a prompt.

    With `add_generation_prompt` the text ends where the model's reply begins. `template_kwargs` are variables of the
    template. `date`, as 2025-12-31, is the day of `strftime_now`; "" is the day on which the job starts.
    """

    add_generation_prompt: bool = True
    template_kwargs: dict[str, Any] = {}
    date: Annotated[str, Meta(pattern=r"^([0-9]{4}-[0-9]{2}-[0-9]{2})?$", max_length=10)] = ""


class ScoreSection(Struct, frozen=True, forbid_unknown_fields=True):
    """`[score]`: what the score task writes of each token beside its log-probability.

    That is the `top_n` likeliest tokens, and all tokens whose log-probability is above `threshold`, none if it is 0;
    their log-probabilities are written as `dtype`.
    """

    top_n: Index = 0
    threshold: Annotated[float, Meta(ge=-10_000, le=0)] = 0.0
    dtype: Literal["float16", "float32"] = "float32"


class ExchangeSection(Struct, frozen=True, forbid_unknown_fields=True):
    """`[exchange]`: communication of rows between ranks.

    Transport "auto" is "cuda_ipc" where it can be used, else the fastest in a probe. With 2 `hops` a row crosses
    the network once per node, and a rank of that node forwards it to its experts; sums are re-associated. `verify`
    compares checksums of all rows at sender and receiver. With `immediate`, experts of a stage's last layer send
    their outputs directly to the next stage. `buffers` is the location of communication buffers with GPUs: device
    memory, which needs a CUDA-aware MPI, or host memory, which GPUs access over the bus; "auto" probes.
    """

    transport: Literal["auto", "alltoallv", "pairwise", "shared", "cuda_ipc"] = "auto"
    hops: Literal[1, 2] = 1
    verify: bool = False
    buffers: Literal["auto", "device", "host"] = "auto"
    immediate: bool = False


class ParallelSection(Struct, frozen=True, forbid_unknown_fields=True):
    """`[parallel]`: division of ranks into stages, tensor groups and data parallel groups.

    `stage_layers` and `stage_ranks` are the numbers of layers and ranks of each stage; if empty, layers are balanced by
    cost and ranks are divided evenly. `experts_per_rank` limits the experts of a layer on a rank; 0 is no limit. The LM
    head is divided in each "tensor" group of the last stage, or among all ranks of that "stage".
    """

    stages: Annotated[int, Meta(ge=1, le=MAX_LAYERS)] = 1
    stage_layers: tuple[Count, ...] = ()
    stage_ranks: tuple[Count, ...] = ()
    tensor: Count = 1
    head: Literal["tensor", "stage"] = "tensor"
    experts_per_rank: Index = 0


class BalanceSection(Struct, frozen=True, forbid_unknown_fields=True):
    """`[balance]`: routing policy that moves choices away from busy experts, at a cost in quality; "off" moves none.

    "bias" adds a term to the selection scores, at most `bound`, which changes by at most `rate` per step. "capacity"
    limits an expert to `capacity` times the mean number of choices of a step. At the end, `sample` requests are scored
    with and without the policy to measure the cost. With a policy, a row's result depends on the other rows.
    """

    mode: Literal["off", "bias", "capacity"] = "off"
    rate: Factor = 0.03
    bound: Factor = 0.5
    capacity: Annotated[float, Meta(ge=1, le=1e6)] = 1.25
    sample: Index = 16


class TopologySection(Struct, frozen=True, forbid_unknown_fields=True):
    """`[topology]`: assumptions that replace detection of the machine.

    `ranks_per_node` above 0 makes virtual nodes of that many ranks; `file` is a topology.json with the nodes of the
    ranks. `rank_memory` is the memory of a rank. `emulate` is a topology.json whose links delay rows to experts, in
    addition to the real exchange.
    """

    ranks_per_node: Index = 0
    file: str = ""
    rank_memory: Size = "auto"
    emulate: str = ""


class PlacementSection(Struct, frozen=True, forbid_unknown_fields=True):
    """`[placement]`: ranks of the experts; `file` is a placement.json, empty for even shares in ascending order."""

    file: str = ""


class TraceSection(Struct, frozen=True, forbid_unknown_fields=True):
    """`[trace]`: what to record at each position besides the outputs.

    `routing` records the experts that each router chose, or also their "weights". `home` adds where each row was
    routed: rank, step and place in it. `true` stands for "weights" with `home`.

    `hidden` are the layers after whose `hidden_sublayer` the residual stream is recorded, as `hidden_dtype`: at all
    positions, at the last one of the prompt, or at the ones that predict the "output". With `hidden_norm`, of the
    model's last layer it is recorded behind the final norm.

    `statistics` records the weights and the norms of the chosen experts' outputs, and sums them up by prompt group.
    """

    routing: bool | Literal["experts", "weights"] = False
    home: bool = False
    hidden: Annotated[tuple[Index, ...], Meta(max_length=MAX_LAYERS)] = ()
    hidden_sublayer: Literal["attention", "feed_forward"] = "feed_forward"
    hidden_norm: bool = False
    hidden_positions: HiddenPositions = "all"
    hidden_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    statistics: bool = False

    @property
    def has_routing(self) -> bool:
        """Whether the chosen experts are recorded."""
        return bool(self.routing) or self.statistics

    @property
    def has_weights(self) -> bool:
        """Whether the weights of the chosen experts are recorded."""
        return self.routing is True or self.routing == "weights" or self.statistics

    @property
    def has_home(self) -> bool:
        """Whether rank, step and row of each route are recorded."""
        return self.routing is True or (self.home and bool(self.routing))


class ReplaySection(Struct, frozen=True, forbid_unknown_fields=True):
    """`[replay]`: a file with the experts of requests at positions, as a run with `trace.routing` writes it.

    Their weights are the router's, or with `weights` the file's. A prompt line may name another file.
    """

    routing: str = ""
    weights: bool = False


class Job(Struct, frozen=True, forbid_unknown_fields=True):
    """A job file."""

    model: ModelSection
    input: InputSection
    output: OutputSection
    task: Literal["generate", "score"] = "generate"
    run: RunSection = RunSection()
    sampling: Sampling = Sampling()
    chat: ChatSection = ChatSection()
    score: ScoreSection = ScoreSection()
    exchange: ExchangeSection = ExchangeSection()
    parallel: ParallelSection = ParallelSection()
    topology: TopologySection = TopologySection()
    placement: PlacementSection = PlacementSection()
    balance: BalanceSection = BalanceSection()
    trace: TraceSection = TraceSection()
    replay: ReplaySection = ReplaySection()

    @property
    def num_micro_batches(self) -> int:
        """Micro-batches in flight; "auto" is two per stage."""
        return 2 * self.parallel.stages if self.run.micro_batches == "auto" else self.run.micro_batches

    @property
    def lanes(self) -> int:
        """Lanes of each stage; "auto" is as many as it has micro-batches on the average, 2 to MOST_LANES."""
        per_stage = self.num_micro_batches // self.parallel.stages
        lanes = min(max(2, per_stage), MOST_LANES) if self.run.lanes == "auto" else self.run.lanes
        return min(lanes, self.num_micro_batches)


CHANGES_RESULTS = (
    "task",
    "input.special_tokens",
    "output.special_tokens",
    "chat.add_generation_prompt",
    "chat.template_kwargs",
    "chat.date",
    "run.backend",
    "run.precision",
    "run.reproducible",
    "run.capture",
    "run.products",
    "input.column",
    "sampling.defaults",
    "sampling.n",
    "sampling.max_tokens",
    "sampling.min_tokens",
    "sampling.temperature",
    "sampling.top_k",
    "sampling.top_p",
    "sampling.min_p",
    "sampling.repetition_penalty",
    "sampling.presence_penalty",
    "sampling.frequency_penalty",
    "sampling.logit_bias",
    "sampling.seed",
    "sampling.stop",
    "sampling.stop_token_ids",
    "sampling.ignore_eos",
    "sampling.top_logprobs",
    "score.top_n",
    "score.threshold",
    "score.dtype",
    "exchange.hops",
    "parallel.tensor",
    "balance.mode",
    "balance.rate",
    "balance.bound",
    "balance.capacity",
    "balance.sample",
    "trace.routing",
    "trace.home",
    "trace.hidden",
    "trace.hidden_sublayer",
    "trace.hidden_norm",
    "trace.hidden_positions",
    "trace.hidden_dtype",
    "trace.statistics",
    "replay.weights",
)
"""Keys that change a result, if only by the order of a sum: all attempts at a job have the same values."""

KEEPS_RESULTS = (
    "model.weights",
    "model.architecture",
    "input.prompts",
    "input.ahead",
    "output.results",
    "run.threads",
    "run.overlap",
    "run.micro_batches",
    "run.lanes",
    "run.max_sequences",
    "run.batch_tokens",
    "run.kv_memory",
    "run.timeout_s",
    "exchange.transport",
    "exchange.verify",
    "exchange.buffers",
    "exchange.immediate",
    "parallel.stages",
    "parallel.stage_layers",
    "parallel.stage_ranks",
    "parallel.head",
    "parallel.experts_per_rank",
    "topology.ranks_per_node",
    "topology.file",
    "topology.rank_memory",
    "topology.emulate",
    "placement.file",
    "replay.routing",
)
"""Keys that may change between attempts. Weights, prompts and given routing count by content, not by name."""


INPUTS = (
    "model.weights",
    "model.architecture",
    "input.prompts",
    "topology.file",
    "topology.emulate",
    "placement.file",
    "replay.routing",
)
OUTPUTS = ("output.results",)
"""Keys that name files."""


def read_job_file(path: str | Path, *, overrides: Iterable[str] = ()) -> Job:
    """Read a job file; its paths become relative to the current folder, like the paths of overrides.

    Raises NoInputError, UsageError or ConfigError: see `read_toml`.
    """
    return read_toml(path, Job, overrides=overrides, inputs=INPUTS, outputs=OUTPUTS)


def input_files(job: Job) -> list[str]:
    """The files that a job reads."""
    paths = [getattr(getattr(job, section), name) for section, name in (key.split(".") for key in INPUTS)]
    return [path for path in paths if path not in ("", STDIN)]


def result_keys(job: Job) -> dict[str, Any]:
    """The values of CHANGES_RESULTS by key."""
    values: dict[str, Any] = msgspec.to_builtins(job)
    flat = {}
    for key in CHANGES_RESULTS:
        section, _, name = key.partition(".")
        flat[key] = values[section][name] if name else values[section]
    return flat
