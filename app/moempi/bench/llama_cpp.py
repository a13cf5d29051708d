"""llama.cpp as a peer of whole runs, if `llama-cpp-python` and `gguf` are installed.

A Qwen3-MoE checkpoint becomes a GGUF file with the same weights. A process of its own loads it and generates greedy
tokens: `python -m moempi.bench.llama_cpp MODEL.gguf PROMPTS.npy TOKENS THREADS OUT.npz`.
"""

import resource
import subprocess
import sys
import time
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from moempi.arrays import IntArray, narrow, widen
from moempi.storage.checkpoint import open_checkpoint
from moempi.storage.tensor_sources import Source

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate": "ffn_gate_inp",
}
EXPERT_NAMES = {"gate_proj": "ffn_gate_exps", "up_proj": "ffn_up_exps", "down_proj": "ffn_down_exps"}
IN_FLOAT32 = ("norm.weight", "ffn_gate_inp.weight")
"""Ends of the names of tensors that GGUF files hold in float32."""


class Run(NamedTuple):
    """One generation: seconds from the first prompt token to the last new one, the new tokens, peak bytes of memory."""

    seconds: float
    tokens: IntArray
    peak_bytes: int


def has_llama_cpp() -> bool:
    """Whether llama.cpp's Python package and the writer of its files are installed."""
    return find_spec("llama_cpp") is not None and find_spec("gguf") is not None


def write_gguf(folder: Path, path: Path, *, precision: str) -> None:
    """Write a Qwen3-MoE checkpoint, whose experts are not fused, as a GGUF file of bfloat16 or float32 matrices."""
    import gguf

    checkpoint = open_checkpoint(folder)
    config = {"num_experts": checkpoint.config.get("num_local_experts"), **checkpoint.config}  # both names are used
    writer = gguf.GGUFWriter(path, "qwen3moe")
    _add_settings(writer, config)
    for name, source in _tensors(checkpoint.tensors, config):
        values = np.stack([_bits(one) for one in source]) if isinstance(source, list) else _bits(source)
        if precision == "float32" or name.endswith(IN_FLOAT32):
            writer.add_tensor(name, widen(values))
        else:
            writer.add_tensor(name, values.view(np.uint8), raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def generate(model: Path, prompts: IntArray, *, tokens: int, threads: int, folder: Path) -> Run:
    """Generate greedy tokens after prompts (batch, length) in a new process; blocks."""
    np.save(folder / "prompts.npy", prompts)
    out = folder / "llama_cpp.npz"
    arguments = map(str, (model, folder / "prompts.npy", tokens, threads, out))
    subprocess.run([sys.executable, "-m", __spec__.name, *arguments], check=True, capture_output=True)
    found = np.load(out)
    return Run(float(found["seconds"]), found["tokens"], int(found["peak_bytes"]))


def _add_settings(writer: Any, config: Mapping[str, Any]) -> None:
    rope = config.get("rope_parameters") or config
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_expert_count(config["num_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")


def _tensors(sources: Mapping[str, Source], config: Mapping[str, Any]) -> list[tuple[str, Source | list[Source]]]:
    """The name of each tensor in the file, and its source; a tensor of experts has a list, one source for each."""
    found: list[tuple[str, Source | list[Source]]] = [
        (f"{name}.weight", sources[f"{theirs}.weight"]) for theirs, name in NAMES.items()
    ]
    for layer in range(config["num_hidden_layers"]):
        ours, path = f"blk.{layer}", f"model.layers.{layer}"
        found += [(f"{ours}.{name}.weight", sources[f"{path}.{their}.weight"]) for their, name in LAYER_NAMES.items()]
        for their, name in EXPERT_NAMES.items():
            experts = range(config["num_experts"])
            found.append(
                (f"{ours}.{name}.weight", [sources[f"{path}.mlp.experts.{e}.{their}.weight"] for e in experts])
            )
    return found


def _bits(source: Source) -> Any:
    """The bfloat16 bits of a tensor."""
    values = source.read(0, source.shape[0])
    return values if values.dtype == np.uint16 else narrow(values)


def _main(model: str, prompts: str, tokens: str, threads: str, out: str) -> None:
    found = _generate(model, np.load(prompts), int(tokens), int(threads))
    np.savez(out, seconds=found.seconds, tokens=found.tokens, peak_bytes=found.peak_bytes)


def _generate(path: str, prompts: IntArray, num_tokens: int, threads: int) -> Run:
    """Prompts in batches of 512 tokens, then a token of each sequence a batch, as llama.cpp's own benchmark does."""
    import llama_cpp as llama

    llama.llama_backend_init()
    model = llama.llama_model_load_from_file(path.encode(), llama.llama_model_default_params())
    sequences, length = prompts.shape
    settings = llama.llama_context_default_params()
    settings.n_ctx = sequences * -(-(length + num_tokens) // 256) * 256
    settings.n_seq_max = sequences
    settings.n_batch = settings.n_ubatch = max(512, sequences)
    settings.n_threads = settings.n_threads_batch = threads
    context = llama.llama_init_from_model(model, settings)
    batch = llama.llama_batch_init(settings.n_batch, 0, 1)
    vocabulary = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
    given = [(s, p, int(prompts[s, p]), p == length - 1) for s in range(sequences) for p in range(length)]
    new = np.zeros((sequences, num_tokens), np.int64)
    begin = time.perf_counter()
    for step in range(num_tokens):
        for first in range(0, len(given), settings.n_batch):
            rows = given[first : first + settings.n_batch]
            for row, (sequence, position, token, wanted) in enumerate(rows):
                batch.token[row], batch.pos[row], batch.logits[row] = token, position, wanted
                batch.n_seq_id[row], batch.seq_id[row][0] = 1, sequence
            batch.n_tokens = len(rows)
            if llama.llama_decode(context, batch):
                raise RuntimeError("llama_decode failed")
            for row, (sequence, _, _, wanted) in enumerate(rows):
                if wanted:
                    logits = np.ctypeslib.as_array(llama.llama_get_logits_ith(context, row), (vocabulary,))
                    new[sequence, step] = logits.argmax()
        given = [(s, length + step, int(new[s, step]), True) for s in range(sequences)]
    seconds = time.perf_counter() - begin
    return Run(seconds, new, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)


if __name__ == "__main__":
    _main(*sys.argv[1:])
