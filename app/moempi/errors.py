"""Errors that are not bugs of the program: a one-line message, and an exit code of sysexits.h."""


class MoempiError(Exception):
    """An error whose message names the problem, its location and the remedy; `exit_code` is the exit status."""

    exit_code = 70


class UsageError(MoempiError):
    """The command line or the launch is wrong (EX_USAGE)."""

    exit_code = 64


class DataError(MoempiError):
    """The content of an input file is wrong (EX_DATAERR)."""

    exit_code = 65


class NoInputError(MoempiError):
    """An input file does not exist or cannot be read (EX_NOINPUT)."""

    exit_code = 66


class StorageError(MoempiError):
    """Writing or reading one of the program's own files failed (EX_IOERR)."""

    exit_code = 74


class ConfigError(MoempiError):
    """The job file, the architecture or the requested machine cannot be used (EX_CONFIG)."""

    exit_code = 78
