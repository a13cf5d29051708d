"""Which rank holds what: grid, topology, placement, row split, schedule, memory. Pure: no MPI, no GPU, no files."""
