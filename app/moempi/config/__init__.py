"""User input: job file, architecture, machine, topology and placement files. Frozen, validated, pure."""
