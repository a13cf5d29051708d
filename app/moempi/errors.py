"""What can go wrong through no fault of the program: one line for a person, and the exit code of sysexits.h."""


class MoempiError(Exception):
    """An error whose text says what is wrong, where, and what to do; `exit_code` is the program's exit status."""

    exit_code = 70


class UsageError(MoempiError):
    """The command line, or the way the program was launched, is wrong (EX_USAGE)."""

    exit_code = 64


class DataError(MoempiError):
    """The content of an input file is wrong (EX_DATAERR)."""

    exit_code = 65


class NoInputError(MoempiError):
    """An input file does not exist or cannot be read (EX_NOINPUT)."""

    exit_code = 66


class StorageError(MoempiError):
    """Writing or reading a file of ours failed (EX_IOERR)."""

    exit_code = 74


class ConfigError(MoempiError):
    """The job file, the architecture or the machine asked for cannot be used (EX_CONFIG)."""

    exit_code = 78
