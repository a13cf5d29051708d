"""What a person sees of a run: progress, the report at the end, log files. No MPI, and no files but the logs."""
