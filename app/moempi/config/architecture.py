"""The architecture of a model: everything about its arithmetic that is not a weight.

It is written as JSON into every weight file, and as TOML by hand for `moempi init`.
"""

from typing import Annotated, Literal

from msgspec import Meta, Struct

Count = Annotated[int, Meta(ge=1)]
Index = Annotated[int, Meta(ge=0)]
Positive = Annotated[float, Meta(gt=0)]


class Rope(Struct, frozen=True, forbid_unknown_fields=True):
    """Rotary position embedding of the head's halves (Su et al. 2021, in the layout of GPT-NeoX)."""

    theta: Positive = 10000.0


class Attention(Struct, frozen=True, forbid_unknown_fields=True):
    """Multi-head attention; `num_kv_heads` below `num_heads` shares each key-value head among several heads."""

    num_heads: Count
    num_kv_heads: Count
    head_dim: Count
    qk_norm: Literal["none", "head"] = "none"
    rope: Rope = Rope()


class Router(Struct, frozen=True, forbid_unknown_fields=True):
    """How a token chooses its experts: softmax over all experts, then the `top_k` largest, lowest index on a tie."""

    top_k: Count
    renormalize: bool = False


class Experts(Struct, frozen=True, forbid_unknown_fields=True):
    """The experts of every MoE layer: SwiGLU feed-forward networks of hidden size `width`."""

    num: Count
    width: Count
    router: Router


class Architecture(Struct, frozen=True, forbid_unknown_fields=True):
    """A decoder-only transformer whose layers outside `dense_layers` are Mixture-of-Experts layers."""

    family: str
    vocab_size: Count
    width: Count
    num_layers: Count
    max_positions: Count
    attention: Attention
    experts: Experts
    dense_layers: tuple[Index, ...] = ()
    dense_width: Index = 0
    norm_eps: Positive = 1e-6
    tied_embeddings: bool = False
    bos_token: Index | None = None
    eos_tokens: tuple[Index, ...] = ()

    def is_moe(self, layer: int) -> bool:
        """Whether `layer` (0-based) routes its tokens to experts."""
        return layer not in self.dense_layers

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """The 0-based indices of the Mixture-of-Experts layers, ascending."""
        return tuple(layer for layer in range(self.num_layers) if self.is_moe(layer))

    def problem(self) -> str | None:
        """What makes this architecture impossible, or None: rules between fields that types cannot say."""
        heads = self.attention
        if heads.num_heads % heads.num_kv_heads:
            return f"attention.num_heads {heads.num_heads} is not a multiple of num_kv_heads {heads.num_kv_heads}"
        if heads.head_dim % 2:
            return f"attention.head_dim {heads.head_dim} is odd, rotary embedding needs an even one"
        if self.experts.router.top_k > self.experts.num:
            return f"experts.router.top_k {self.experts.router.top_k} exceeds experts.num {self.experts.num}"
        if any(layer >= self.num_layers for layer in self.dense_layers):
            return f"dense_layers {list(self.dense_layers)} names a layer beyond num_layers {self.num_layers}"
        if self.dense_layers and not self.dense_width:
            return "dense_width is 0 but dense_layers is not empty"
        tokens = (*self.eos_tokens, *(() if self.bos_token is None else (self.bos_token,)))
        if any(token >= self.vocab_size for token in tokens):
            return f"an end or begin token lies beyond vocab_size {self.vocab_size}"
        return None
