"""The SIMT device with real CuPy arrays, over host memory: CuPy's slicing, views, strides and errors without a GPU.

Only the arrays are CuPy's; the work is done as on the SIMT device. An operation that CuPy would compute on a GPU fails.
"""

import cupy
import numpy as np

from moempi.backend.cuda.device import ExpertTable
from simt.device import SimtDevice, _fresh


def interface(array):
    """The array interface of the memory of a CuPy array, NumPy's and CUDA's."""
    return {
        "version": 3,
        "shape": array.shape,
        "typestr": array.dtype.str,
        "data": (array.data.ptr, False),
        "strides": array.strides,
    }


class CupyArray(cupy.ndarray):
    """A CuPy array that MPI sends and receives without a driver, which CuPy asks for the kind of its memory."""

    def __dlpack_device__(self):
        raise NotImplementedError  # so that mpi4py takes the interface

    @property
    def __cuda_array_interface__(self):
        return interface(self)


class HostView:
    """NumPy's view of the host memory of a CuPy array, which stays alive with it."""

    def __init__(self, array):
        self.array = array
        self.__array_interface__ = interface(array)


def on_host(values):
    """A NumPy view of any argument that is a CuPy array; a table of experts with such views."""
    if isinstance(values, ExpertTable):
        matrices, biases = (list(map(on_host, arrays)) for arrays in (values.matrices, values.biases))
        return values._replace(matrices=matrices, biases=biases)
    if not isinstance(values, cupy.ndarray):
        return values
    return np.asarray(HostView(values)) if values.size else np.empty(values.shape, values.dtype)


class CupyArrayDevice(SimtDevice):
    """A SIMT device whose arrays are CuPy's; if `pinned`, comm buffers are NumPy arrays."""

    name = "CuPy arrays on the CPU"

    def _resident(self, values):
        owner = cupy.cuda.UnownedMemory(values.ctypes.data if values.size else 0, values.nbytes, values, 0)
        return CupyArray(values.shape, values.dtype, cupy.cuda.MemoryPointer(owner, 0))

    def empty(self, shape, dtype):
        return self._resident(_fresh(shape, dtype))

    def holds(self, values):
        return isinstance(values, cupy.ndarray)

    def upload(self, values):
        resident, copied = self.empty(values.shape, values.dtype), values.copy()
        held = on_host(resident)
        self.submit("upload", lambda: np.copyto(held, copied), (held, True))
        return resident

    def download(self, values):
        return super().download(on_host(values))

    def start_download(self, values):
        return super().start_download(on_host(values))

    def copy(self, values, out):
        assert values.flags.c_contiguous
        assert out.flags.c_contiguous
        super().copy(on_host(values), on_host(out))

    def launch(self, kernel, grid, threads, arguments, **options):
        super().launch(kernel, grid, threads, [on_host(argument) for argument in arguments], **options)

    def product(self, x, matrix, out, *, transposed):
        """As cuBLAS, which takes rows of x that are strided, and a matrix and results that are not."""
        assert x.strides[-1] == x.itemsize
        assert matrix.flags.c_contiguous
        assert out.flags.c_contiguous
        super().product(*map(on_host, (x, matrix, out)), transposed=transposed)

    def products(self, x, matrices, out):
        assert x.strides[-1] == x.itemsize
        assert matrices.flags.c_contiguous
        assert out.flags.c_contiguous
        super().products(*map(on_host, (x, matrices, out)))
