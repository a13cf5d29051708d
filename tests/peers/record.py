"""Records the fixtures of tests/model/test_recorded.py: python tests/peers/record.py [NAME...]; peers extra."""

import json
import sys
import tempfile
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TESTS))

import torch  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from peers import families  # noqa: E402

SPACES = {"hidden_size": 24, "n_routed_experts": 4, "mamba_num_heads": 4, "n_groups": 2, "time_step_min": 0.5}
SMALLER = {"num_hidden_layers": 2, "hidden_size": 24}
RECORDED = {
    "qwen3_moe": ("qwen3_moe", SMALLER | {"num_experts": 5}),
    "deepseek_v3": ("deepseek_v3-groups-yarn", SMALLER | {"n_shared_experts": 1, "kv_lora_rank": 8, "v_head_dim": 8}),
    "phimoe": ("phimoe-longrope-biases", {"num_hidden_layers": 2, "num_local_experts": 3}),
    "gpt_oss": ("gpt_oss-yarn", SMALLER | {"num_local_experts": 3, "layer_types": families.SLIDING[:2]}),
    "qwen3_next": ("qwen3_next", SMALLER | {"num_experts": 4, "layer_types": [families.LINEAR, families.FULL]}),
    "qwen3_5_moe": (
        "qwen3_5_moe_text",
        SMALLER | {"num_experts": 4, "layer_types": [families.FULL, families.LINEAR], "linear_value_head_dim": 7},
    ),
    "nemotron_h": (
        "nemotron_h",
        SPACES | {"layers_block_type": [families.LINEAR, "moe", families.FULL, "mlp"], "num_hidden_layers": 4},
    ),
    "nemotron_h_latent": (
        "nemotron_h-latent",
        SPACES | {"layers_block_type": ["moe", families.LINEAR, "moe"], "num_hidden_layers": 3, "moe_latent_size": 8},
    ),
}


def record(folder: Path, case: str, changes: dict) -> None:
    """Write a checkpoint in bfloat16 and what transformers' float32 makes of one prompt."""
    model_type, options = families.CASES[case]
    families.CASES["recorded"] = (model_type, options | changes)
    prompt = families.prompts(case)[0]
    with tempfile.TemporaryDirectory() as place:
        source = Path(place)
        families.write_checkpoint(source, "recorded")
        logprobs = families.expected(source, [prompt]).float32[0]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text((source / "config.json").read_text())
        tensors = {
            name: tensor if name.endswith("correction_bias") else tensor.to(torch.bfloat16)
            for name, tensor in load_file(source / "model.safetensors").items()
        }
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "model.safetensors").chmod(0o644)
    answer = {"tokens": prompt, "logprobs": [round(value, 6) for value in logprobs.tolist()]}
    (folder / "expected.json").write_text(json.dumps(answer) + "\n")


for name in sys.argv[1:] or RECORDED:
    record(TESTS / "fixtures" / name, *RECORDED[name])
