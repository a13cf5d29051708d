"""Memory for matrices: arrays that overlap none, are aligned, and keep their chunk alive."""

import gc
import weakref

import numpy as np
import pytest

from moempi.arrays import ALIGNMENT_BYTES
from moempi.backend.cpu import weight_memory
from moempi.backend.cpu.weight_memory import HUGE_PAGE_BYTES, WeightMemory


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(weight_memory, "CHUNK_BYTES", 65536)
    monkeypatch.setattr(weight_memory, "FIRST_BYTES", 4096)


def test_arrays_of_any_size_are_aligned_and_overlap_none(small_chunks):
    memory, random = WeightMemory(), np.random.default_rng(3)
    arrays = []
    for number in range(200):
        dtype = np.dtype(("uint16", "float32")[number % 2])
        array = memory.empty((int(random.integers(0, 40)), int(random.integers(1, 90))), dtype)
        assert not array.size or array.ctypes.data % ALIGNMENT_BYTES == 0
        array[:] = number
        arrays.append(array)
    assert all((array == number).all() for number, array in enumerate(arrays))


def test_few_weights_take_no_huge_page(monkeypatch):
    made = []
    monkeypatch.setattr(
        weight_memory, "_chunk", lambda num_bytes: made.append(num_bytes) or np.empty(num_bytes, np.uint8)
    )
    memory = WeightMemory()
    arrays = [memory.empty((weight_memory.FIRST_BYTES // 16,), np.uint8) for _ in range(16)]
    assert len(arrays) == 16
    assert not made
    memory.empty((1,), np.uint8)
    assert made == [weight_memory.CHUNK_BYTES]


def test_a_large_array_begins_with_a_huge_page_and_is_freed_alone(small_chunks):
    memory = WeightMemory()
    small = memory.empty((8,), np.float32)
    large = memory.empty((3 << 20,), np.uint8)
    assert large.ctypes.data % HUGE_PAGE_BYTES == 0
    large[:] = 7
    assert memory.empty((8,), np.float32).ctypes.data == small.ctypes.data + ALIGNMENT_BYTES  # in the same chunk
    freed = weakref.ref(root_of(large))
    del large
    gc.collect()
    assert freed() is None


def root_of(array):
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array


def test_too_little_memory_is_an_error_of_memory():
    with pytest.raises(MemoryError, match=r"1,125,899,906,842,624 bytes for weights"):
        WeightMemory().empty((1 << 50,), np.uint8)


def test_an_array_outlives_its_memory():
    memory = WeightMemory()
    array = memory.empty((1000, 1000), np.float32)
    array[:] = 5
    del memory
    gc.collect()
    assert (array == 5).all()
