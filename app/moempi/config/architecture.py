"""The architecture of a model: all parameters of its arithmetic except the weights.

Every weight file contains it as JSON; `moempi init` reads it as TOML.
"""

from math import prod
from pathlib import Path
from typing import Annotated, Literal

from msgspec import Meta, Struct

from moempi.config.reading import read_toml
from moempi.errors import ConfigError

LARGEST = 1.7976931348623157e308  # the largest finite float: rejects infinity

MAX_LAYERS = 1000

Count = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Index = Annotated[int, Meta(ge=0, le=2**63 - 1)]
Positive = Annotated[float, Meta(gt=0, le=LARGEST)]


Rotations = Annotated[float, Meta(gt=0, le=1e6)]


class Yarn(Struct, frozen=True, forbid_unknown_fields=True):
    """Interpolation of low rotary frequencies for a longer context (YaRN, Peng et al. 2023)."""

    factor: Positive
    original_positions: Count
    beta_fast: Rotations = 32.0
    beta_slow: Rotations = 1.0
    truncate: bool = True


class LongRope(Struct, frozen=True, forbid_unknown_fields=True):
    """The divisors and the amplitude of sequences that may have more than `original_positions` (LongRoPE)."""

    original_positions: Count
    divisors: tuple[Positive, ...]
    amplitude: Positive


class Rope(Struct, frozen=True, forbid_unknown_fields=True):
    """Rotary position embedding (Su et al. 2021) of the first `dim` numbers of a head, all of them when 0.

    The two numbers of a rotated pair are dim / 2 apart, or adjacent if `interleaved`. Cosines and sines are multiplied
    by `amplitude`; the i-th frequency is divided by `divisors[i]` (LongRoPE, Ding et al. 2024), all by a single one.
    Long sequences have their own divisors and amplitude in `long`. With `none`, nothing is rotated.
    """

    theta: Positive = 10000.0
    dim: Index = 0
    interleaved: bool = False
    amplitude: Positive = 1.0
    divisors: tuple[Positive, ...] = ()
    yarn: Yarn | None = None
    long: LongRope | None = None
    none: bool = False


class Indexer(Struct, frozen=True, forbid_unknown_fields=True):
    """The lightning indexer of sparse attention (DeepSeek-V3.2, 2025): a token attends to `top_k` positions only.

    They have the largest scores of its `num_heads` heads of size `head_dim`, the lowest position on a tie. The first
    numbers of a head are rotated, as adjacent pairs if `interleaved`. The `shared_layers` have no indexer: they take
    the positions of the last layer before them that has one.
    """

    num_heads: Count
    head_dim: Count
    top_k: Count
    interleaved: bool = False
    shared_layers: Annotated[tuple[Index, ...], Meta(max_length=MAX_LAYERS)] = ()
    norm_eps: Positive = 1e-6


class Latent(Struct, frozen=True, forbid_unknown_fields=True):
    """Multi-head latent attention (DeepSeek-V2, 2024): keys and values are expanded from one latent vector per token.

    The last `rope_dim` of a head's `head_dim` numbers are rotated, and all heads share their keys. Queries are expanded
    from a latent vector of size `query_rank`, or computed from the row if it is 0. With an `indexer`, attention is
    sparse.
    """

    key_value_rank: Count
    rope_dim: Count
    value_dim: Count
    query_rank: Index = 0
    norm_eps: Positive = 1e-6
    indexer: Indexer | None = None


class AttentionShape(Struct, frozen=True, forbid_unknown_fields=True):
    """Multi-head attention; with `num_kv_heads` below `num_heads`, several heads share a key-value head.

    `qk_norm` normalizes queries and keys per head, or as one vector over all heads. `biases` are added to queries, keys
    and values ("qkv"), or to the output too ("all"). `clip` bounds queries, keys and values. `sinks` are learned
    logits, one per head, in the softmax's denominator. The `windowed_layers` attend to the last `window` positions
    only. Scores are multiplied by head_dim^-0.5 and by `score_factor`. With `output_gate`, the attended values are
    multiplied by the sigmoid of as many further projections of the row.
    """

    num_heads: Count
    num_kv_heads: Count
    head_dim: Count
    qk_norm: Literal["none", "head", "vector"] = "none"
    rope: Rope = Rope()
    biases: Literal["none", "qkv", "all"] = "none"
    clip: Positive | None = None
    sinks: bool = False
    window: Index = 0
    windowed_layers: Annotated[tuple[Index, ...], Meta(max_length=MAX_LAYERS)] = ()
    score_factor: Positive = 1.0
    latent: Latent | None = None
    output_gate: bool = False

    @property
    def value_dim(self) -> int:
        """Size of a head's values."""
        return self.latent.value_dim if self.latent else self.head_dim

    @property
    def cached_heads(self) -> int:
        """Key-value heads in the cache; one if all heads share a latent vector."""
        return 1 if self.latent else self.num_kv_heads

    @property
    def cached_dim(self) -> int:
        """Size of a cached key: head size, or size of the latent vector plus its shared rotated part."""
        return self.latent.key_value_rank + self.latent.rope_dim if self.latent else self.head_dim

    @property
    def cached_values(self) -> int:
        """Numbers per position in the cache of one layer."""
        return self.cached_dim if self.latent else 2 * self.num_kv_heads * self.head_dim

    @property
    def indexer(self) -> Indexer | None:
        """The indexer of sparse attention, None if all positions are attended to."""
        return self.latent.indexer if self.latent else None


class DeltaRule(Struct, frozen=True, forbid_unknown_fields=True):
    """Linear attention by the gated delta rule (Yang et al. 2025), with a state per sequence instead of cached keys.

    Each of `num_value_heads` heads has a state (key_dim, value_dim) in float32; a key head is shared by adjacent value
    heads. Queries, keys and values first pass a causal convolution of `taps` positions.
    """

    num_key_heads: Count
    num_value_heads: Count
    key_dim: Annotated[int, Meta(ge=1, le=1 << 10)]
    value_dim: Annotated[int, Meta(ge=1, le=1 << 10)]
    taps: Annotated[int, Meta(ge=2, le=64)]

    @property
    def mixed_dim(self) -> int:
        """Numbers of a row that pass the convolution: queries, keys and values of all heads."""
        return 2 * self.num_key_heads * self.key_dim + self.num_value_heads * self.value_dim

    @property
    def state_values(self) -> int:
        """Numbers of the state of one sequence in one layer, with the rows that the convolution looks back to."""
        return prod(self.memory_shape) + (self.taps - 1) * self.mixed_dim

    @property
    def memory_shape(self) -> tuple[int, int, int]:
        """Heads, key dim and value dim of the state of one sequence in one layer."""
        return self.num_value_heads, self.key_dim, self.value_dim

    @property
    def row_values(self) -> int:
        """Numbers of a row that a layer holds at its peak."""
        return 2 * self.mixed_dim + self.num_value_heads * self.value_dim


class StateSpace(Struct, frozen=True, forbid_unknown_fields=True):
    """Selective state spaces (Mamba-2, Dao & Gu 2024), with a state per sequence instead of cached keys.

    Each of `num_heads` heads has a state (state_dim, head_dim) in float32; the inputs and outputs of the state are
    shared by the adjacent heads of a group. Heads, inputs and outputs first pass a causal convolution of `taps`
    positions with a bias. The step of a row is at least `least_step`.
    """

    num_heads: Count
    head_dim: Annotated[int, Meta(ge=1, le=1 << 10)]
    num_groups: Count
    state_dim: Annotated[int, Meta(ge=1, le=1 << 10)]
    taps: Annotated[int, Meta(ge=2, le=64)]
    least_step: Annotated[float, Meta(ge=0, le=LARGEST)] = 0.0

    @property
    def mixed_dim(self) -> int:
        """Numbers of a row that pass the convolution: heads, and inputs and outputs of the groups' states."""
        return self.num_heads * self.head_dim + 2 * self.num_groups * self.state_dim

    @property
    def state_values(self) -> int:
        """Numbers of the state of one sequence in one layer, with the rows that the convolution looks back to."""
        return prod(self.memory_shape) + (self.taps - 1) * self.mixed_dim

    @property
    def memory_shape(self) -> tuple[int, int, int]:
        """Heads, state dim and head dim of the state of one sequence in one layer."""
        return self.num_heads, self.state_dim, self.head_dim

    @property
    def row_values(self) -> int:
        """Numbers of a row that a layer holds at its peak."""
        return 2 * self.mixed_dim + 3 * self.num_heads * self.head_dim


class Router(Struct, frozen=True, forbid_unknown_fields=True):
    """Selection of the `top_k` experts of a token, the lowest index on a tie, and of their weights.

    `scoring` is the softmax over all experts, the sigmoid, the softmax over the chosen experts, or the two-step masked
    softmax of SparseMixer (Liu et al. 2023) with its `jitter`. A float32 `correction` is added to the scores for
    selection only. With several groups, selection is limited to the `kept_groups` groups with the largest maximum score
    ("max") or the largest sum of two scores ("top2"). With `renormalize`, weights are divided by their sum, at least
    `least_sum`; then they are multiplied by `scaling`. `float32_logits` keeps the router's matrix and logits in
    float32, `float32_weights` the weights.
    """

    top_k: Count
    scoring: Literal["softmax", "sigmoid", "softmax_chosen", "sparsemixer"] = "softmax"
    jitter: Positive = 0.01
    bias: bool = False
    correction: bool = False
    num_groups: Count = 1
    kept_groups: Count = 1
    group_score: Literal["max", "top2"] = "max"
    renormalize: bool = False
    least_sum: Positive = 1e-20
    scaling: Positive = 1.0
    float32_logits: bool = False
    float32_weights: bool = False


class Clamp(Struct, frozen=True, forbid_unknown_fields=True):
    """The SwiGLU of gpt-oss: gate g at most `limit`, up u within it; (u + 1) * g * sigmoid(alpha * g)."""

    alpha: Positive
    limit: Positive


class Experts(Struct, frozen=True, forbid_unknown_fields=True):
    """The experts of every MoE layer: feed-forward networks of hidden size `width`.

    If `shared_width` is not 0, a shared expert of that hidden size processes every token; `shared_gate` multiplies its
    output by the sigmoid of one additional logit. If `latent_width` is not 0, a token's row is mapped to that width for
    its experts, and their weighted sum back to the model's width; router and shared expert process the row itself.
    """

    num: Annotated[int, Meta(ge=1, le=1 << 16)]
    width: Count
    router: Router
    biases: bool = False
    clamp: Clamp | None = None
    shared_width: Index = 0
    latent_width: Index = 0
    shared_gate: bool = False


class Architecture(Struct, frozen=True, forbid_unknown_fields=True):
    """A decoder-only transformer whose layers outside `dense_layers` are Mixture-of-Experts layers.

    `norm` is the root mean square norm, rounded before ("rms") or after ("rms_float32") multiplication by its weight,
    or the layer norm with a bias ("layer"). With `float32_norms`, all weights of norms are float32. `head_bias`
    is added to the logits. The `delta_layers` have a `delta_rule` in place of the attention, the `state_space_layers` a
    `state_space`. The layers `without_attention` are a feed-forward alone, the layers `without_feed_forward` an
    attention or what is in its place. Feed-forward networks are SwiGLU networks, or down(max(0, up x)^2) with the
    `activation` "relu2" (So et al. 2021).
    """

    family: str
    vocab_size: Count
    width: Count
    num_layers: Annotated[int, Meta(ge=1, le=MAX_LAYERS)]
    max_positions: Count
    attention: AttentionShape
    experts: Experts
    dense_layers: Annotated[tuple[Index, ...], Meta(max_length=MAX_LAYERS)] = ()
    dense_width: Index = 0
    norm: Literal["rms", "rms_float32", "layer"] = "rms"
    norm_eps: Positive = 1e-6
    tied_embeddings: bool = False
    head_bias: bool = False
    float32_norms: bool = False
    delta_rule: DeltaRule | None = None
    delta_layers: Annotated[tuple[Index, ...], Meta(max_length=MAX_LAYERS)] = ()
    state_space: StateSpace | None = None
    state_space_layers: Annotated[tuple[Index, ...], Meta(max_length=MAX_LAYERS)] = ()
    without_attention: Annotated[tuple[Index, ...], Meta(max_length=MAX_LAYERS)] = ()
    without_feed_forward: Annotated[tuple[Index, ...], Meta(max_length=MAX_LAYERS)] = ()
    activation: Literal["swiglu", "relu2"] = "swiglu"
    bos_token: Index | None = None
    eos_tokens: tuple[Index, ...] = ()

    def is_moe(self, layer: int) -> bool:
        """Whether `layer` (0-based) routes its tokens to experts."""
        return layer not in self.dense_layers and self.has_feed_forward(layer)

    @property
    def routed_width(self) -> int:
        """Numbers of a row that is sent to an expert, and of its output."""
        return self.experts.latent_width or self.width

    def has_feed_forward(self, layer: int) -> bool:
        """Whether `layer` has a feed-forward, dense or of experts."""
        return layer not in self.without_feed_forward

    def has_attention(self, layer: int) -> bool:
        """Whether `layer` has an attention, or what is in its place."""
        return layer not in self.without_attention

    @property
    def half_layers(self) -> tuple[int, ...]:
        """The layers with an attention alone, or a feed-forward alone."""
        return *self.without_attention, *self.without_feed_forward

    def has_cache(self, layer: int) -> bool:
        """Whether `layer` keeps keys and values of positions."""
        return self.has_attention(layer) and not self.has_state(layer)

    @property
    def recurrence(self) -> DeltaRule | StateSpace | None:
        """The rule of the layers that keep a state per sequence, if there are such."""
        return self.delta_rule or self.state_space

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """The 0-based indices of the Mixture-of-Experts layers, ascending."""
        return tuple(layer for layer in range(self.num_layers) if self.is_moe(layer))

    def has_state(self, layer: int) -> bool:
        """Whether `layer` keeps a state per sequence, and no keys and values."""
        return layer in self.delta_layers or layer in self.state_space_layers

    def kind(self, layer: int) -> tuple[object, ...]:
        """What the time of a layer depends on: layers of one kind take equal times."""
        parts = self.has_attention(layer), self.has_feed_forward(layer), self.has_state(layer)
        return *parts, self.is_moe(layer), self.window(layer), self.has_indexer(layer)

    def window(self, layer: int) -> int:
        """Positions that a token of `layer` attends to, itself included; 0 for all."""
        return self.attention.window if layer in self.attention.windowed_layers else 0

    def has_indexer(self, layer: int) -> bool:
        """Whether `layer` has an indexer of its own."""
        indexer = self.attention.indexer
        return indexer is not None and layer not in indexer.shared_layers

    @property
    def joined_layers(self) -> tuple[int, ...]:
        """The layers that must be on the stage of the layer before, whose chosen positions they share."""
        return self.attention.indexer.shared_layers if self.attention.indexer else ()

    def index_values(self, layer: int) -> int:
        """Numbers per position in the cache of the indexer of `layer`, 0 if it has none."""
        indexer = self.attention.indexer
        return indexer.head_dim if indexer and self.has_indexer(layer) else 0

    def problem(self) -> str | None:
        """The error in constraints between several fields, or None."""
        if any(layer >= self.num_layers for layer in (*self.dense_layers, *self.attention.windowed_layers)):
            return f"dense_layers or attention.windowed_layers name a layer beyond num_layers {self.num_layers}"
        if self.dense_layers and not self.dense_width:
            return "dense_width is 0 but dense_layers is not empty"
        tokens = (*self.eos_tokens, *(() if self.bos_token is None else (self.bos_token,)))
        if any(token >= self.vocab_size for token in tokens):
            return f"an end or begin token lies beyond vocab_size {self.vocab_size}"
        if self.float32_norms and self.norm == "layer":
            return "float32_norms goes with root mean square norms only"
        return (
            _attention_problem(self.attention)
            or _indexer_problem(self.attention, num_layers=self.num_layers)
            or _experts_problem(self.experts)
            or _delta_problem(self)
            or _state_space_problem(self)
            or _halves_problem(self)
        )


def read_architecture_file(path: str | Path) -> Architecture:
    """Read an architecture in TOML; raises NoInputError if it cannot be read, ConfigError if it is impossible."""
    architecture = read_toml(path, Architecture)
    problem = architecture.problem()
    if problem:
        raise ConfigError(f"{path}: {problem}")
    return architecture


def _attention_problem(attention: AttentionShape) -> str | None:
    rope, latent = attention.rope, attention.latent
    dim = rope.dim or (latent.rope_dim if latent else attention.head_dim)
    if attention.num_heads % attention.num_kv_heads:
        return f"attention.num_heads {attention.num_heads} is not a multiple of num_kv_heads {attention.num_kv_heads}"
    if dim % 2 or dim > attention.head_dim:
        return f"rotary embedding of {dim} numbers of a head of {attention.head_dim}: needs an even part of it"
    if latent and (dim != latent.rope_dim or latent.rope_dim >= attention.head_dim):
        return f"attention.latent.rope_dim {latent.rope_dim} is not a part of attention.head_dim {attention.head_dim}"
    if latent and not _is_plain(attention):
        return "attention.latent goes with no qk_norm, clip, sinks, window or output gate, and with all biases or none"
    if rope.yarn and rope.theta <= 1:
        return f"attention.rope.theta {rope.theta} with yarn: needs one above 1"
    if rope.divisors and len(rope.divisors) not in (1, dim // 2):
        return f"attention.rope.divisors has {len(rope.divisors)} numbers, not {dim // 2}"
    if rope.long and len(rope.long.divisors) != dim // 2:
        return f"attention.rope.long.divisors has {len(rope.long.divisors)} numbers, not {dim // 2}"
    if attention.windowed_layers and not attention.window:
        return "attention.window is 0 but windowed_layers is not empty"
    return None


def _indexer_problem(attention: AttentionShape, *, num_layers: int) -> str | None:
    indexer, latent = attention.indexer, attention.latent
    if indexer is None or latent is None:
        return None
    if not latent.query_rank:
        return "attention.latent.indexer needs a query_rank: its queries are expanded from the latent vector of queries"
    if indexer.head_dim < latent.rope_dim:
        return f"attention.latent.indexer.head_dim {indexer.head_dim} is less than the rope_dim {latent.rope_dim}"
    shared = indexer.shared_layers
    if any(layer >= num_layers for layer in shared) or len(set(shared)) != len(shared):
        return f"attention.latent.indexer.shared_layers names a layer twice, or beyond num_layers {num_layers}"
    if 0 in indexer.shared_layers:
        return "attention.latent.indexer.shared_layers has layer 0, before which no layer has an indexer"
    return None


def _delta_problem(architecture: Architecture) -> str | None:
    rule, layers = architecture.delta_rule, architecture.delta_layers
    if any(layer >= architecture.num_layers for layer in layers) or len(set(layers)) != len(layers):
        return f"delta_layers names a layer twice, or beyond num_layers {architecture.num_layers}"
    if layers and architecture.attention.indexer:
        return "delta_layers and attention.latent.indexer do not go together"
    if bool(layers) != (rule is not None):
        return "delta_layers and delta_rule go together: one is missing"
    if rule and rule.num_value_heads % rule.num_key_heads:
        return f"delta_rule.num_value_heads {rule.num_value_heads} is not a multiple of {rule.num_key_heads} key heads"
    return None


def _state_space_problem(architecture: Architecture) -> str | None:
    space, layers = architecture.state_space, architecture.state_space_layers
    if any(layer >= architecture.num_layers for layer in layers) or len(set(layers)) != len(layers):
        return f"state_space_layers names a layer twice, or beyond num_layers {architecture.num_layers}"
    if bool(layers) != (space is not None):
        return "state_space_layers and state_space go together: one is missing"
    if layers and architecture.attention.indexer:
        return "state_space_layers and attention.latent.indexer do not go together"
    if space and architecture.delta_rule:
        return "state_space and delta_rule exclude each other"
    if space and space.num_heads % space.num_groups:
        return f"state_space.num_heads {space.num_heads} is not a multiple of {space.num_groups} groups"
    return None


def _halves_problem(architecture: Architecture) -> str | None:
    """Every layer has an attention or a feed-forward; what has none is not described further."""
    bare, alone = architecture.without_attention, architecture.without_feed_forward
    if any(layer >= architecture.num_layers for layer in (*bare, *alone)):
        return f"without_attention or without_feed_forward name a layer beyond num_layers {architecture.num_layers}"
    if set(bare) & set(alone):
        return "without_attention and without_feed_forward name the same layer"
    if set(bare) & {*architecture.delta_layers, *architecture.state_space_layers}:
        return "without_attention names a layer of a delta_rule or state_space"
    if set(alone) & set(architecture.dense_layers):
        return "without_feed_forward and dense_layers name the same layer"
    if (bare or alone) and architecture.attention.indexer:
        return "without_attention and without_feed_forward go with no attention.latent.indexer"
    if architecture.activation == "relu2" and (architecture.experts.biases or architecture.experts.clamp):
        return "activation relu2 goes with no biases and no clamp of experts"
    return None


def _is_plain(attention: AttentionShape) -> bool:
    more = (
        attention.qk_norm != "none", attention.clip, attention.sinks, attention.windowed_layers, attention.output_gate
    )  # fmt: skip
    return not any(more) and attention.biases != "qkv"


def _experts_problem(experts: Experts) -> str | None:
    router = experts.router
    if router.top_k > experts.num:
        return f"experts.router.top_k {router.top_k} exceeds experts.num {experts.num}"
    if experts.num % router.num_groups or router.kept_groups > router.num_groups:
        return f"{experts.num} experts in {router.num_groups} groups, {router.kept_groups} kept: not equal, or too many"
    group = experts.num // router.num_groups
    if router.num_groups > 1 and router.top_k > router.kept_groups * group:
        return f"experts.router.top_k {router.top_k} exceeds the {router.kept_groups * group} experts of kept groups"
    if router.group_score == "top2" and router.num_groups > 1 and group < 2:
        return "experts.router.group_score top2 needs groups of two experts or more"
    if router.scoring == "sparsemixer" and router.top_k != 2:
        return f"experts.router.top_k is {router.top_k}, sparsemixer chooses 2"
    if experts.shared_gate and not experts.shared_width:
        return "experts.shared_gate without a shared_width"
    return None
