"""Models with a state per sequence: log-probabilities have the same bits for any steps, slots and lanes."""

import numpy as np
import pytest
from msgspec import structs

from engine.runs import SMALL, Run, requests_of
from moempi.backend.cpu.compiled import CompiledBackend
from moempi.backend.cpu.kernels import load_kernels
from moempi.config.architecture import DeltaRule

ARCHITECTURE = structs.replace(
    SMALL,
    max_positions=640,
    attention=structs.replace(SMALL.attention, output_gate=True, qk_norm="head"),
    norm="rms_float32",
    float32_norms=True,
    delta_rule=DeltaRule(num_key_heads=2, num_value_heads=4, key_dim=4, value_dim=6, taps=4),
    delta_layers=(0, 1, 3),
)
LENGTHS = (70, 3, 130, 1, 64, 9, 65)


def compiled_backend(progress):
    kernels = load_kernels()
    if kernels is None:
        pytest.skip("no C compiler")
    return CompiledBackend(kernels, precision="bfloat16", threads=2, progress=progress)


def computed(folder, lengths=LENGTHS, **options):
    """The tokens and the bits of their log-probabilities, of each request."""
    folder.mkdir(exist_ok=True)
    run = Run(folder, requests_of(*lengths, limit=4), architecture=ARCHITECTURE, **options)
    run.lanes.run()
    return [
        (request.tokens, np.concatenate([sampled.logprobs for sampled in request.sampled]).tobytes())
        for request in run.requests
    ]


@pytest.mark.parametrize("batch_tokens", [7, 64, 512])
@pytest.mark.parametrize("sequences", [1, 2, 7])
@pytest.mark.parametrize("lanes", [1, 3])
def test_steps_slots_and_lanes_change_no_bit(tmp_path, batch_tokens, sequences, lanes):
    expected = computed(tmp_path / "whole", run={"batch_tokens": 512, "max_sequences": 7, "micro_batches": 1})
    run = {"batch_tokens": batch_tokens, "max_sequences": sequences, "micro_batches": lanes}
    assert computed(tmp_path / "divided", run=run) == expected


@pytest.mark.parametrize("batch_tokens", [7, 64])
def test_compiled_kernels_and_bfloat16_change_no_bit_either(tmp_path, batch_tokens):
    options = {"precision": "bfloat16", "max_sequences": 2}
    expected, found = (
        computed(
            tmp_path / str(rows),
            make_backend=compiled_backend,
            run=options | {"batch_tokens": rows, "micro_batches": 1},
        )
        for rows in (512, batch_tokens)
    )
    assert found == expected


def test_a_request_is_the_same_after_any_other_in_its_slot(tmp_path):
    alone = computed(tmp_path / "alone", lengths=(70,))
    queued = computed(tmp_path / "queued", lengths=(70, 33, 70), run={"max_sequences": 1, "micro_batches": 1})
    assert queued[0] == alone[0]
    assert computed(tmp_path / "again", lengths=(70, 33, 70), run={"max_sequences": 3}) == queued
