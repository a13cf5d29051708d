"""Rotary frequencies against transformers, for every type that is read."""

from typing import Any

import numpy as np
import pytest

from config.test_hub_configs import GLM_AIR, OLMOE, read
from moempi.model.rope import frequencies

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
rope_utils = pytest.importorskip("transformers.modeling_rope_utils")

ROPES: list[dict[str, Any]] = [
    {"rope_type": "linear", "factor": 2.5},
    {"rope_type": "dynamic", "factor": 4.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
    {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096, "truncate": False},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 2.0,
        "high_freq_factor": 3.0,
        "original_max_position_embeddings": 64,
    },
]


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize("theta", [10000.0, 500000.0])
@pytest.mark.parametrize("partial", [False, True])
def test_frequencies_and_amplitude(rope, theta, partial):
    values = (GLM_AIR if partial else OLMOE) | {"rope_theta": theta, "rope_scaling": rope}
    ours = read(values).attention.rope
    parameters = rope | {"rope_theta": theta} | ({"partial_rotary_factor": 0.5} if partial else {})
    config = transformers.AutoConfig.for_model(
        "glm4_moe" if partial else "olmoe",
        hidden_size=2048,
        num_attention_heads=16,
        head_dim=128,
        max_position_embeddings=values["max_position_embeddings"],
        rope_parameters=parameters,
    )
    theirs, amplitude = rope_utils.ROPE_INIT_FUNCTIONS[rope["rope_type"]](config, device="cpu")
    found = frequencies(ours, dim=ours.dim or 128)
    np.testing.assert_allclose(found, theirs.numpy(), rtol=3e-6)
    assert ours.amplitude == pytest.approx(amplitude)
