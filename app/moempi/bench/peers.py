"""What the benchmarks compare with: the same work done by torch and transformers, where these are installed."""

from collections.abc import Callable
from datetime import timedelta
from functools import partial
from importlib.util import find_spec
from typing import Any

from moempi.arrays import widen
from moempi.bench.layers import Rows, Sizes, expert_bits, router_bits
from moempi.parallel.world import World

# batched_mm copies the weights of every (token, expert) pair and is never the best on a CPU.
EXPERTS_IMPLEMENTATIONS = ("eager", "grouped_mm")


def has_torch() -> bool:
    """Whether torch is installed."""
    return find_spec("torch") is not None


def moe_blocks(sizes: Sizes, rows: Rows, *, precision: str) -> dict[str, Callable[[], Any]]:
    """Transformers' Qwen3-MoE block with our weights, by experts implementation, applied to rows (T, D), one thread.

    Empty where torch or transformers is missing.
    """
    if not has_torch() or find_spec("transformers") is None:
        return {}
    import torch
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    torch.set_num_threads(1)
    config = Qwen3MoeConfig(
        hidden_size=sizes.width,
        moe_intermediate_size=sizes.expert_width,
        num_experts=sizes.num_experts,
        num_experts_per_tok=sizes.top_k,
        norm_topk_prob=True,
    )
    block = Qwen3MoeSparseMoeBlock(config).eval()
    networks = [expert_bits(sizes, expert) for expert in range(sizes.num_experts)]
    with torch.no_grad():
        block.gate.weight.copy_(torch.from_numpy(widen(router_bits(sizes))))
        for expert, (gate_up, down) in enumerate(networks):
            block.experts.gate_up_proj[expert].copy_(torch.from_numpy(widen(gate_up)))
            block.experts.down_proj[expert].copy_(torch.from_numpy(widen(down)))
    dtype = getattr(torch, precision)
    block = block.to(dtype)
    x = torch.from_numpy(rows).to(dtype)[None]

    def apply(implementation: str) -> Any:
        config._experts_implementation = implementation
        with torch.no_grad():
            return block(x)[0]

    return {f"transformers {name}": partial(apply, name) for name in EXPERTS_IMPLEMENTATIONS}


def gpu_expert(gate_up: Any, down: Any, num_rows: int) -> Callable[[], Any] | None:
    """Torch's way of one expert on `num_rows` rows of the GPU, given its stored bits; None where torch sees none."""
    if not has_torch():
        return None
    import torch

    if not torch.cuda.is_available():
        return None
    first, second = (torch.from_numpy(widen(bits)).to("cuda", torch.bfloat16).T for bits in (gate_up, down))
    x = torch.randn(num_rows, first.shape[0], device="cuda", dtype=torch.bfloat16)

    def apply() -> Any:
        gate, up = (x @ first).chunk(2, dim=1)
        return torch.nn.functional.silu(gate) * up @ second

    return apply


def start_gloo(world: World) -> Any:
    """Torch's gloo process group of the same ranks, or None without torch or on several nodes; collective."""
    if not has_torch() or world.num_nodes > 1:
        return None
    import torch.distributed as dist

    limit = timedelta(seconds=60)
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if world.rank == 0 else None
    port = world.comm.bcast(store.port if store else 0)
    store = store or dist.TCPStore("127.0.0.1", port, is_master=False)
    dist.init_process_group("gloo", store=store, rank=world.rank, world_size=world.size, timeout=limit)
    return dist


def gloo_exchange(gloo: Any, outgoing: Any, incoming: Any) -> Callable[[], Any]:
    """The function that sends an equal share of `outgoing` to every rank."""
    import torch

    sent, received = torch.from_numpy(outgoing), torch.from_numpy(incoming)
    return lambda: gloo.all_to_all_single(received, sent)


def stop_gloo(gloo: Any) -> None:
    """Leave the process group, if there is one; collective."""
    if gloo is not None:
        gloo.destroy_process_group()
