"""The ranks of a Python script that uses moempi: they make the same calls, and errors are exceptions of the script."""

import atexit
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import NoReturn

from moempi.errors import ConfigError, DataError, MoempiError, NoInputError, StorageError, UsageError
from moempi.printing import print_traceback, write_error
from moempi.runtime.launcher import GRACE_S
from moempi.runtime.monitor import Monitor
from moempi.runtime.world import World

KINDS = {kind.exit_code: kind for kind in (UsageError, DataError, NoInputError, StorageError, ConfigError)}
END = "the end of the script"


class ScriptWorld(World):
    """A World in which all ranks raise an agreed error, instead of exiting with it.

    With several ranks, from `begin` to the end of the interpreter, an uncaught exception, a signal or the death of one
    rank ends all ranks with one error line. Objects from other ranks are not restricted: a script sends its own.
    """

    restricts_messages = False
    _agreed: MoempiError | None = None

    def begin(self) -> None:
        """Watch over the ranks until the interpreter exits; main thread only. Does nothing on a single rank."""
        if self.size == 1:
            return
        guard = self.guard()
        guard.__enter__()
        sys.excepthook = lambda _, error, __: self._end_all(error)

        def end() -> None:
            try:
                self.require_same_call(END)
            except MoempiError as error:  # another rank is in a call, and would wait for ever
                self._end_all(error)
            guard.__exit__(None, None, None)

        atexit.register(end)

    def require_same_call(self, call: str) -> None:
        """Raise UsageError on all ranks if they make different calls, which `call` tells apart; collective, blocks."""
        first: str = self.comm.bcast(call)
        problem = f"this rank makes another call than rank 0, which all ranks must make alike: {call}, not {first}"
        self.raise_together(None if call == first else UsageError(problem))

    @contextmanager
    def call(self, call: str, *, timeout_s: float) -> Iterator[None]:
        """Run a call that all ranks make in this block; collective, blocks.

        An agreed error leaves it on all ranks. Any other exception of one of several ranks aborts all ranks. Raises
        UsageError as `require_same_call` does.
        """
        self.require_same_call(call)
        self.watch(timeout_s)
        try:
            yield
        except BaseException as error:
            if error is not self._agreed and self.size > 1:
                self.abort(error)
            raise
        finally:
            self.end_watch()

    def _raise_agreed(self, error: MoempiError | None, first: int) -> NoReturn:
        if error is not None and self.size == 1:
            self._agreed = error
            raise error
        own = (0, "") if error is None else (error.exit_code, str(error))
        code, text = self.comm.bcast(own, root=first)
        self._agreed = KINDS.get(code, MoempiError)(f"rank {first}: {text}")
        raise self._agreed from error

    def _end_all(self, error: BaseException) -> NoReturn:
        time.sleep(0.0 if self.rank == 0 else GRACE_S)  # if all ranks have the same error, rank 0 prints it
        self.abort(error)

    def _print_error(self, error: BaseException, cause: str) -> None:
        """Print also where the script raised the error; an agreed one names its rank itself."""
        if error.__traceback__ is not None:
            print_traceback(error)
        if error is self._agreed:
            write_error(cause)
        else:
            super()._print_error(error, cause)


@cache
def script_world() -> ScriptWorld:
    """The world of this script, which begins with the first call; collective then, and blocks.

    Raises UsageError if the launcher started another number of processes than MPI connects.
    """
    world = ScriptWorld.start(Monitor())
    world.begin()
    return world
