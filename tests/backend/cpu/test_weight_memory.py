"""Memory for matrices: arrays that overlap none, are aligned, and keep their chunk alive."""

import gc

import numpy as np
import pytest

from moempi.arrays import ALIGNMENT_BYTES
from moempi.backend.cpu import weight_memory
from moempi.backend.cpu.weight_memory import HUGE_PAGE_BYTES, WeightMemory


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(weight_memory, "CHUNK_BYTES", 4096)


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


def test_a_chunk_begins_with_a_huge_page_and_holds_what_is_larger(small_chunks):
    memory = WeightMemory()
    large = memory.empty((3 << 20,), np.uint8)
    assert large.ctypes.data % HUGE_PAGE_BYTES == 0
    large[:] = 7
    assert memory.empty((1,), np.float32).ctypes.data % HUGE_PAGE_BYTES == 0  # the next chunk


def test_an_array_outlives_its_memory():
    memory = WeightMemory()
    array = memory.empty((1000, 1000), np.float32)
    array[:] = 5
    del memory
    gc.collect()
    assert (array == 5).all()
