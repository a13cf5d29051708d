"""What a person sees of a run: progress, tables, log files. Needs no MPI, and writes no files but the logs."""
