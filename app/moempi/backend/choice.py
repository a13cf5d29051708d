"""Which backend a run uses."""

from moempi.backend.numpy_backend import NumpyBackend
from moempi.backend.protocol import Backend
from moempi.config.job import RunSection
from moempi.errors import ConfigError


def make_backend(run: RunSection) -> Backend:
    """The backend that the job names. Raises ConfigError when this installation has none of that name."""
    if run.backend == "cupy":
        raise ConfigError('run.backend = "cupy": this version computes on NumPy only; use "auto" or "numpy"')
    return NumpyBackend(precision=run.precision, reproducible=run.reproducible)
