"""The machine: one Protocol of verbs on rows, implemented with NumPy (cpu/) and with CUDA kernels (cuda/)."""
