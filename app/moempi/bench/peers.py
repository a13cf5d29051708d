"""The same work done by torch and transformers, if they are installed."""

from collections.abc import Callable
from datetime import timedelta
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from moempi.arrays import Float32Array, widen
from moempi.bench.jobs import WEIGHTS
from moempi.bench.measure import sleep_until_all
from moempi.bench.random_layer import Sizes, expert_bits, router_bits
from moempi.errors import UsageError
from moempi.runtime.world import World
from moempi.storage.convert import convert

# batched_mm copies the weights of every (token, expert) pair and is never the best on a CPU.
EXPERTS_IMPLEMENTATIONS = ("eager", "grouped_mm")


def has_torch() -> bool:
    """Whether torch is installed."""
    return find_spec("torch") is not None


def has_transformers() -> bool:
    """Whether transformers is installed, and torch with it."""
    return has_torch() and find_spec("transformers") is not None


def check_peers(world: World, *, benchmark: str) -> None:
    """Raises UsageError on several nodes or without transformers."""
    if world.num_nodes > 1:
        raise UsageError(f"bench {benchmark} compares cores of one node; start it on one")
    if not has_transformers():
        raise UsageError(f"bench {benchmark} needs torch and transformers: bash jobs/setup.sh local convert peers")


def moe_blocks(sizes: Sizes, rows: Float32Array, *, precision: str, threads: int) -> dict[str, Callable[[], Any]]:
    """Transformers' Qwen3-MoE block with our weights on rows (T, D), by experts implementation.

    Empty if torch or transformers is not installed.
    """
    if not has_transformers():
        return {}
    import torch

    torch.set_num_threads(threads)
    config, block = make_moe_block(sizes)
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


def make_moe_block(sizes: Sizes) -> tuple[Any, Any]:
    """The configuration and the Qwen3-MoE block of transformers, with weights of its own, on torch's default device."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    config = Qwen3MoeConfig(
        hidden_size=sizes.width,
        moe_intermediate_size=sizes.expert_width,
        num_experts=sizes.num_experts,
        num_experts_per_tok=sizes.top_k,
        norm_topk_prob=True,
    )
    return config, Qwen3MoeSparseMoeBlock(config).eval()


SMALL: dict[str, int] = {
    "hidden_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "moe_intermediate_size": 256,
    "num_experts": 16,
    "num_experts_per_tok": 4,
}
"""About 30 million parameters."""
LARGE: dict[str, int] = {
    "hidden_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "moe_intermediate_size": 512,
    "num_experts": 32,
    "num_experts_per_tok": 8,
}
"""About 430 million parameters."""


VOCABULARY = 512


def make_model(world: World, folder: Path, *, large: bool) -> None:
    """Save a random model in folder / "model" and convert it for moempi; collective, blocks."""
    if world.rank == 0:
        save_model(folder / "model", sizes=LARGE if large else SMALL)
        convert(folder / "model", folder / WEIGHTS)
    sleep_until_all(world)


def save_model(folder: Path, *, sizes: dict[str, int]) -> None:
    """Save a random Qwen3-MoE with these sizes."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        **sizes,
        vocab_size=VOCABULARY,
        head_dim=64,
        intermediate_size=1024,
        norm_topk_prob=True,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        initializer_range=0.05,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def generators(
    folder: Path, prompts: Any, *, tokens: int, precision: str, threads: int
) -> dict[str, Callable[[], Any]]:
    """Transformers' greedy generation for `prompts` (batch, length), by experts implementation.

    Each function returns the new tokens (batch, tokens).
    """
    import torch

    model, inputs = _load(folder, precision=precision, threads=threads), torch.from_numpy(prompts)

    def generate(implementation: str) -> Any:
        model.config._experts_implementation = implementation
        with torch.no_grad():
            generated = model.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=tokens,
                min_new_tokens=tokens,
                do_sample=False,
            )
        return generated[:, prompts.shape[1] :].numpy()

    return {f"transformers {name}": partial(generate, name) for name in EXPERTS_IMPLEMENTATIONS}


def scorers(folder: Path, prompts: Any, *, precision: str, threads: int) -> dict[str, Callable[[], Any]]:
    """Transformers' scoring of `prompts` (batch, length), by experts implementation.

    Each function returns the log-probabilities (batch, length - 1) of all tokens but the first, in float32.
    """
    import torch

    model, inputs = _load(folder, precision=precision, threads=threads), torch.from_numpy(prompts)

    def score(implementation: str) -> Any:
        model.config._experts_implementation = implementation
        with torch.no_grad():
            logits = model(inputs, use_cache=False).logits[:, :-1].float()
            return logits.log_softmax(-1).gather(2, inputs[:, 1:, None])[:, :, 0].numpy()

    return {f"transformers {name}": partial(score, name) for name in EXPERTS_IMPLEMENTATIONS}


def _load(folder: Path, *, precision: str, threads: int) -> Any:
    """Transformers' model of a checkpoint; torch computes with `threads` from now on."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.set_num_threads(threads)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, precision)).eval()


def start_gloo(world: World) -> Any:
    """Torch's gloo process group of the same ranks; None without torch or on several nodes. Collective."""
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
    """A function that sends an equal share of `outgoing` to every rank; its calls are collective."""
    import torch

    sent, received = torch.from_numpy(outgoing), torch.from_numpy(incoming)
    return lambda: gloo.all_to_all_single(received, sent)


def stop_gloo(gloo: Any) -> None:
    """End the process group, None for no group; collective."""
    if gloo is not None:
        gloo.destroy_process_group()
