"""The machine: one Protocol of verbs on rows, implemented for NumPy and for CuPy."""
