"""The architecture of a model: everything about its arithmetic that is not a weight.

It is written as JSON into every weight file, and as TOML by hand for `moempi init`.
"""

from typing import Annotated, Literal

from msgspec import Meta, Struct

LARGEST = 1.7976931348623157e308  # infinity is no size of anything

Count = Annotated[int, Meta(ge=1)]
Index = Annotated[int, Meta(ge=0)]
Positive = Annotated[float, Meta(gt=0, le=LARGEST)]


class Yarn(Struct, frozen=True, forbid_unknown_fields=True):
    """Interpolation of the slow rotary frequencies to a longer context (YaRN, Peng et al. 2023)."""

    factor: Positive
    original_positions: Count
    beta_fast: Positive = 32.0
    beta_slow: Positive = 1.0
    truncate: bool = True


class Rope(Struct, frozen=True, forbid_unknown_fields=True):
    """Rotary position embedding (Su et al. 2021) of the first `dim` numbers of a head, all of them when 0.

    The two numbers that turn together stand half of `dim` apart, or beside each other when `interleaved`. Cosines and
    sines are multiplied by `amplitude`; the i-th frequency is divided by `divisors[i]` (LongRoPE, Ding et al. 2024).
    """

    theta: Positive = 10000.0
    dim: Index = 0
    interleaved: bool = False
    amplitude: Positive = 1.0
    divisors: tuple[Positive, ...] = ()
    yarn: Yarn | None = None


class Latent(Struct, frozen=True, forbid_unknown_fields=True):
    """Multi-head latent attention (DeepSeek-V2, 2024): keys and values are expanded from one short vector a token.

    Of a head's `head_dim` the last `rope_dim` numbers are rotated, and their keys are shared by all heads. Queries come
    from a vector of `query_rank`, or straight from the row when 0.
    """

    key_value_rank: Count
    rope_dim: Count
    value_dim: Count
    query_rank: Index = 0
    norm_eps: Positive = 1e-6


class Attention(Struct, frozen=True, forbid_unknown_fields=True):
    """Multi-head attention; `num_kv_heads` below `num_heads` shares each key-value head among several heads.

    `qk_norm` normalizes queries and keys head by head, or as one vector over all heads. `biases` belong to queries,
    keys and values, or to the output too. `clip` bounds queries, keys and values. `sinks` are learned logits, one a
    head, that take a part of the softmax. The `windowed_layers` see the last `window` positions only. Scores are
    multiplied by head_dim^-0.5 and by `score_factor`.
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
    windowed_layers: tuple[Index, ...] = ()
    score_factor: Positive = 1.0
    latent: Latent | None = None

    @property
    def value_dim(self) -> int:
        """Size of a head's values."""
        return self.latent.value_dim if self.latent else self.head_dim

    @property
    def cached_heads(self) -> int:
        """Key-value heads in the cache: a latent vector serves all heads."""
        return 1 if self.latent else self.num_kv_heads

    @property
    def cached_dim(self) -> int:
        """Size of a cached key: of a head, or of the latent vector and the shared rotated part."""
        return self.latent.key_value_rank + self.latent.rope_dim if self.latent else self.head_dim

    @property
    def cached_values(self) -> int:
        """Numbers that one position takes in the cache of one layer."""
        return self.cached_dim if self.latent else 2 * self.num_kv_heads * self.head_dim


class Router(Struct, frozen=True, forbid_unknown_fields=True):
    """How a token chooses its `top_k` experts and their weights; lowest index on a tie.

    `scoring` is the softmax over all experts, the sigmoid of each, the softmax over the chosen ones, or the two-step
    masked softmax of SparseMixer (Liu et al. 2023) with its `jitter`. Selection, not the weights, follows the scores
    plus a float32 `correction`; with several groups it is limited to the `kept_groups` best, by their greatest score or
    the sum of their two greatest. Weights are divided by their sum (at least `least_sum`) where `renormalize`, then
    multiplied by `scaling`. `float32_logits` keeps the router's matrix and logits in float32, `float32_weights` the
    weights.
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
    """The experts of every MoE layer: SwiGLU feed-forward networks of hidden size `width`.

    A network of hidden size `shared_width`, if not 0, serves every token beside them; `shared_gate` multiplies what it
    gives by the sigmoid of one more logit.
    """

    num: Count
    width: Count
    router: Router
    biases: bool = False
    clamp: Clamp | None = None
    shared_width: Index = 0
    shared_gate: bool = False


class Architecture(Struct, frozen=True, forbid_unknown_fields=True):
    """A decoder-only transformer whose layers outside `dense_layers` are Mixture-of-Experts layers.

    `norm` is the root mean square norm rounded before its weight is applied, the same rounded after, or the layer norm
    with a bias. `head_bias` is added to the logits.
    """

    family: str
    vocab_size: Count
    width: Count
    num_layers: Count
    max_positions: Count
    attention: Attention
    experts: Experts
    dense_layers: tuple[Index, ...] = ()
    dense_width: Index = 0
    norm: Literal["rms", "rms_float32", "layer"] = "rms"
    norm_eps: Positive = 1e-6
    tied_embeddings: bool = False
    head_bias: bool = False
    bos_token: Index | None = None
    eos_tokens: tuple[Index, ...] = ()

    def is_moe(self, layer: int) -> bool:
        """Whether `layer` (0-based) routes its tokens to experts."""
        return layer not in self.dense_layers

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """The 0-based indices of the Mixture-of-Experts layers, ascending."""
        return tuple(layer for layer in range(self.num_layers) if self.is_moe(layer))

    def window(self, layer: int) -> int:
        """How many of the last positions `layer` sees, itself included; 0 for all."""
        return self.attention.window if layer in self.attention.windowed_layers else 0

    def problem(self) -> str | None:
        """What makes this architecture impossible, or None: rules between fields that types cannot say."""
        if any(layer >= self.num_layers for layer in (*self.dense_layers, *self.attention.windowed_layers)):
            return f"dense_layers or attention.windowed_layers name a layer beyond num_layers {self.num_layers}"
        if self.dense_layers and not self.dense_width:
            return "dense_width is 0 but dense_layers is not empty"
        tokens = (*self.eos_tokens, *(() if self.bos_token is None else (self.bos_token,)))
        if any(token >= self.vocab_size for token in tokens):
            return f"an end or begin token lies beyond vocab_size {self.vocab_size}"
        return _attention_problem(self.attention) or _experts_problem(self.experts)


def _attention_problem(attention: Attention) -> str | None:
    rope, latent = attention.rope, attention.latent
    dim = rope.dim or (latent.rope_dim if latent else attention.head_dim)
    if attention.num_heads % attention.num_kv_heads:
        return f"attention.num_heads {attention.num_heads} is not a multiple of num_kv_heads {attention.num_kv_heads}"
    if dim % 2 or dim > attention.head_dim:
        return f"rotary embedding of {dim} numbers of a head of {attention.head_dim}: needs an even part of it"
    if latent and (dim != latent.rope_dim or latent.rope_dim >= attention.head_dim):
        return f"attention.latent.rope_dim {latent.rope_dim} is not a part of attention.head_dim {attention.head_dim}"
    if latent and not _is_plain(attention):
        return "attention.latent goes with no qk_norm, clip, sinks or window, and with all biases or none"
    if rope.yarn and rope.theta <= 1:
        return f"attention.rope.theta {rope.theta} with yarn: needs one above 1"
    if rope.divisors and len(rope.divisors) != dim // 2:
        return f"attention.rope.divisors has {len(rope.divisors)} numbers, not {dim // 2}"
    if attention.windowed_layers and not attention.window:
        return "attention.window is 0 but windowed_layers is not empty"
    return None


def _is_plain(attention: Attention) -> bool:
    more = (attention.qk_norm != "none", attention.clip, attention.sinks, attention.windowed_layers)
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
