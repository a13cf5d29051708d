"""Arithmetic about runs before they run: pure, imports no MPI and no GPU."""
