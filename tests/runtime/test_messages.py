"""Objects from other ranks are made of a few types; a pickle that names anything else is refused before it acts."""

import pickle
from collections import Counter

import numpy as np
import pytest
from mpi4py import MPI

from moempi.backend.values import SampledTokens
from moempi.comm.batch import NO_STEP
from moempi.config.job import Sampling
from moempi.runtime.hang import Position
from moempi.runtime.messages import restrict_messages
from moempi.runtime.world import World
from moempi.storage.run_state import RunState


class Touch:
    """An object whose pickle makes the receiver call a method of a path."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return type(self.path).touch, (self.path,)


@pytest.fixture
def load():
    restrict_messages()
    yield MPI.pickle.loads
    MPI.pickle.__init__()


def same(first, second):
    if isinstance(first, np.ndarray):
        return first.dtype == second.dtype and np.array_equal(first, second)
    return first == second


@pytest.mark.parametrize(
    "message",
    [
        None,
        {"a": (1, 2.5, "text", b"bytes", True), "b": [{1, 2}]},
        Counter(stop=3),
        np.arange(6).reshape(2, 3),
        np.arange(6).reshape(2, 3).T,
        np.zeros((0, 2), np.float32),
        np.array([(1, 2.0)], [("index", np.int64), ("score", np.float32)]),
        np.float64(1.5),
        Position(None, 3, "step", "waits", 0.5),
        Sampling(top_k=3),
        RunState(state="running", requests=3, world_size=2, started="", updated=""),
    ],
)
def test_what_ranks_send_is_received(load, message):
    assert same(message, load(MPI.pickle.dumps(message)))


def test_the_records_of_a_step_are_received(load, tmp_path):
    index = np.arange(3)
    sampled = SampledTokens(index, np.ones(3, np.float32), np.ones((3, 2), np.int32), np.ones((3, 2), np.float32))
    received = load(MPI.pickle.dumps((NO_STEP, sampled, [tmp_path])))
    assert received[0].stop
    np.testing.assert_array_equal(received[1].tokens, index)
    assert received[2] == [tmp_path]


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("posix", "system"),
        ("builtins", "eval"),
        ("moempi.runtime.world", "_print_error"),
        ("moempi.runtime.world", "World"),
        ("moempi.runtime.world", "os.system"),
        ("moempi.storage.files", "os"),
        ("moempi.no_such_module", "Batch"),
        ("numpy", "fromfile"),
        ("pathlib", "Path.touch"),
    ],
)
def test_a_message_that_names_anything_else_is_refused(load, module, name):
    message = b"\x80\x04" + pickle.SHORT_BINUNICODE + bytes([len(module)]) + module.encode()
    message += pickle.SHORT_BINUNICODE + bytes([len(name)]) + name.encode() + pickle.STACK_GLOBAL + pickle.STOP
    with pytest.raises(pickle.UnpicklingError, match=rf"^a message between ranks names {module}\.{name}, which no"):
        load(message)


@pytest.mark.ranks(2)
def test_a_rank_of_a_world_does_not_call_what_a_message_names(comm, tmp_path):
    world = World(comm)
    path = tmp_path / "touched"
    if world.rank == 0:
        comm.send(Touch(path), 1)
    else:
        with pytest.raises(pickle.UnpicklingError, match="which no message needs"):
            comm.recv(source=0)
        assert not path.exists()
