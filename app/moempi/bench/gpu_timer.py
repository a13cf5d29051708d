"""CUDA events and a kernel that keeps the GPU busy, on CuPy's current stream."""

from typing import Any

import cupy
import numpy as np

CYCLES_PER_S = 2.0e9
"""At least the clock rate of the GPU's multiprocessors, so that a spin lasts at least as long as it should."""
SPIN = r"""
extern "C" __global__ void spin(long long cycles) {
  const long long begin = clock64();
  while (clock64() - begin < cycles) {
  }
}
"""


class CudaTimer:
    """The timer of a GPU: see `gpu_clock.Timer`."""

    def __init__(self) -> None:
        self._spin = cupy.RawKernel(SPIN, "spin")

    @property
    def stream(self) -> int:
        """The address of the current stream, for libraries that submit to it."""
        return int(cupy.cuda.get_current_stream().ptr)

    def spin(self, seconds: float) -> None:
        """Submit a kernel that runs for at least `seconds` on one multiprocessor."""
        self._spin((1,), (1,), (np.int64(seconds * CYCLES_PER_S),))

    def record_event(self) -> Any:
        """Record an event with a time behind all work in the current stream."""
        return cupy.cuda.get_current_stream().record(cupy.cuda.Event())

    def is_done(self, event: Any) -> bool:
        """Whether the GPU has reached the event; does not block."""
        return bool(event.done)

    def seconds(self, begin: Any, end: Any) -> float:
        """Seconds between two events that the GPU has reached."""
        return float(cupy.cuda.get_elapsed_time(begin, end)) * 1e-3

    def synchronize(self) -> None:
        """Block until all streams are idle."""
        cupy.cuda.runtime.deviceSynchronize()

    def free_memory(self) -> None:
        """Return unused memory of CuPy's pools to the driver; blocks."""
        cupy.get_default_memory_pool().free_all_blocks()
        cupy.get_default_pinned_memory_pool().free_all_blocks()
