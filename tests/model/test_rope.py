"""Rotary frequencies and angles of every kind of checkpoint."""

import math

import numpy as np
import pytest
from msgspec.structs import replace

from moempi.backend.cpu.backend import NumpyBackend
from moempi.config.architecture import AttentionShape, Latent, LongRope, Rope, Yarn
from moempi.model.rope import frequencies, rope_angles

V3 = Yarn(factor=40.0, original_positions=4096)
GPT_OSS = Yarn(factor=32.0, original_positions=4096, truncate=False)
K2 = Yarn(factor=32.0, original_positions=4096, beta_fast=1.0, beta_slow=1.0)


def test_plain_frequencies_equal_their_definition():
    expected = [100.0 ** (-2 * i / 8) for i in range(4)]
    np.testing.assert_allclose(frequencies(Rope(theta=100.0), dim=8), expected, rtol=1e-6)


def test_divisors_divide_the_frequencies():
    rope = Rope(theta=100.0, divisors=(1.0, 2.0, 4.0, 8.0))
    expected = [100.0 ** (-2 * i / 8) / 2**i for i in range(4)]
    np.testing.assert_allclose(frequencies(rope, dim=8), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("yarn", "theta", "dim", "low", "high"),
    [
        (V3, 1e4, 64, 10, 23),
        (K2, 5e4, 64, 19, 20),
        (GPT_OSS, 1.5e5, 64, 8.0928, 17.398),
    ],
)
def test_yarn_ramps_from_the_low_to_the_high_bound(yarn, theta, dim, low, high):
    plain = np.array([theta ** (-2 * i / dim) for i in range(dim // 2)])
    divided = np.clip((np.arange(dim // 2) - low) / (high - low), 0, 1)
    expected = plain / yarn.factor * divided + plain * (1 - divided)
    np.testing.assert_allclose(frequencies(Rope(theta=theta, yarn=yarn), dim=dim), expected, rtol=2e-4)


@pytest.mark.parametrize(
    ("attention", "rotated"),
    [
        (AttentionShape(2, 2, 16), 16),
        (AttentionShape(2, 2, 16, rope=Rope(dim=4)), 4),
        (AttentionShape(2, 2, 16, latent=Latent(8, 6, 8)), 6),
    ],
)
def test_only_the_rope_dimensions_are_rotated(attention, rotated):
    backend, x = NumpyBackend(precision="float32"), np.ones((1, 2, 16), np.float32)
    angles = rope_angles(backend, attention, np.array([math.pi]), np.array([4]))
    rotated_x = backend.rotate(x, angles)
    assert (rotated_x[..., rotated:] == 1).all()
    assert rotated_x[0, 0, 0] == pytest.approx(-1, abs=1e-6)


def test_amplitude_multiplies_the_rotated_numbers():
    backend, x = NumpyBackend(precision="float32"), np.ones((1, 1, 4), np.float32)
    angles = rope_angles(backend, AttentionShape(1, 1, 4, rope=Rope(amplitude=1.5)), np.array([0]), np.array([1]))
    np.testing.assert_array_equal(backend.rotate(x, angles, interleaved=True), 1.5 * x)


LONG = LongRope(original_positions=8, divisors=(2.0, 4.0), amplitude=1.5)


@pytest.mark.parametrize("capacities", [[8, 8, 8, 8], [9, 9, 9, 9], [9, 3, 3, 50], [1, 9, 9, 1], []])
def test_long_sequences_have_their_own_divisors_and_amplitude_from_the_first_position_on(capacities):
    backend, positions = NumpyBackend(precision="float32"), np.array([0, 1, 2, 7])[: len(capacities)]
    short = Rope(divisors=(1.0, 1.5), amplitude=1.25)
    found = rope_angles(
        backend, AttentionShape(1, 1, 4, rope=replace(short, long=LONG)), positions, np.array(capacities, np.int64)
    )
    assert all(array.shape == (len(capacities), 1, 2) for array in found)
    for row, (position, capacity) in enumerate(zip(positions, capacities, strict=True)):
        rope = Rope(divisors=LONG.divisors, amplitude=LONG.amplitude) if capacity > 8 else short
        expected = rope_angles(backend, AttentionShape(1, 1, 4, rope=rope), np.array([position]), np.array([capacity]))
        for array, one in zip(found, expected, strict=True):
            np.testing.assert_array_equal(array[row], one[0])
