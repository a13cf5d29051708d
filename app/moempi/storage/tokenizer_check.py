"""Checks of a tokenizer that nobody has used yet, in processes of their own: see `tokenizer_trial`."""

import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence

from msgspec import DecodeError, Struct, json

from moempi.errors import DataError, StorageError

TRIAL = "moempi.storage.tokenizer_trial"
MAX_REASON = 200


class Reply(Struct, frozen=True):
    """What a process found: the `text` of a tokenizer if it made one, or an `error`."""

    text: str = ""
    error: str = ""


def check_tokenizer(text: str, *, origin: str) -> None:
    """Raise DataError that names `origin` if a text is not a tokenizer, or ends the process that uses it.

    Raises StorageError if no process can be started. Blocks.
    """
    reply = ask(TRIAL, origin=origin, content=text.encode())
    if reply.error:
        raise DataError(f"{origin}: not a tokenizer: {reply.error[:MAX_REASON]}")


def ask(
    module: str,
    *arguments: str,
    origin: str,
    content: bytes = b"",
    environment: Mapping[str, str] | None = None,
) -> Reply:
    """The reply of a module that is run with `content` on stdin, about the tokenizer of `origin`; blocks.

    Raises DataError if the process does not end well, StorageError if none can be started.
    """
    command: Sequence[str] = [sys.executable, "-P", "-m", module, *arguments]
    try:
        # A session of its own: Ctrl-C ends the command, and leaves no word of this process.
        done = subprocess.run(
            command, check=False, input=content, capture_output=True, env=environment, start_new_session=True
        )
    except OSError as error:
        raise StorageError(f"the process for tokenizers cannot be started: {error.strerror}") from error
    if not done.returncode:
        try:
            return json.decode(done.stdout, type=Reply)
        except (DecodeError, UnicodeDecodeError) as error:
            raise DataError(f"{origin}: its tokenizer has an error that is not text") from error
    raise DataError(f"{origin}: not a usable tokenizer: {_ending(done.returncode)}")


def _ending(code: int) -> str:
    return "it takes too long" if -code == signal.SIGXCPU else "it needs too much memory, or crashes"
