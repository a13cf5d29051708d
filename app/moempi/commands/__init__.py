"""One file a command: `add_flags(parser)`, `run(chosen)` and the tables that it prints.

Only the file of the chosen command is imported. A command that starts MPI forks its monitor first, so it imports what
needs MPI inside `run`.
"""
