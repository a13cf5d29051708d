"""One file a command: its flags, its wiring and its tables."""
