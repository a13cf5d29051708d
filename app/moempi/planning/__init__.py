"""Forecasts of runs and search for placements of experts. Pure: imports no MPI, no GPU and no files."""
